//! Readers in stock.
//!
//! Entering a version with a reader that is there costs one exchange in a cache line of one's own; making a reader
//! costs several in shared ones. So a guard that is dropped leaves its reader in the stock of the thread that drops
//! it, and `memory()` takes one from the stock of the thread that calls it. Neither takes a lock.
//!
//! Where guards wander (one thread takes them, another drops them), readers would pile up on one side and be missing
//! on the other: a stock that is full gives half of it to the space's depot, an empty one is filled from there, a
//! lock for every few guards. What the depot has no room for goes.
//!
//! A reader keeps the table's memory. When the table goes, its listener empties the depot and says so; from then on
//! dropped guards leave nothing. What lies in the stocks of other threads goes when they next look for a stock
//! that they do not have, or drop a guard of that space, or end.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memslot::{AddressSpaceId, Handle, ParkedReader};

use crate::log::Marks;

/// Readers that a thread keeps for a space.
const STOCK: usize = 16;
/// Readers that a depot keeps.
const DEPOT: usize = 256;

/// What a space, its guards and its listener share.
pub(crate) struct Common {
    /// A number that no two spaces have.
    pub(crate) number: u64,
    pub(crate) handle: Handle,
    pub(crate) space: AddressSpaceId,
    pub(crate) marks: Option<Arc<Marks>>,
    table_is_gone: AtomicBool,
    depot: Apart<Mutex<Tickets>>,
}

/// Written now and then, so it does not share the line of what every guard reads.
#[repr(align(128))]
struct Apart<T>(T);

/// Readers, and what the guard of each keeps alive. Both are in stock together, so that a guard counts nothing.
///
/// They lie apart, because a pair of both is copied in pieces of another size than it was written in, and the
/// processor waits until such a write is done.
#[derive(Default)]
struct Tickets {
    readers: Vec<ParkedReader>,
    commons: Vec<Arc<Common>>,
}

impl Tickets {
    fn with_capacity(n: usize) -> Self {
        Self { readers: Vec::with_capacity(n), commons: Vec::with_capacity(n) }
    }

    fn len(&self) -> usize {
        self.readers.len()
    }

    #[inline]
    fn pop(&mut self) -> Option<(ParkedReader, Arc<Common>)> {
        self.readers.pop().zip(self.commons.pop())
    }

    #[inline]
    fn push(&mut self, reader: ParkedReader, common: Arc<Common>) {
        self.readers.push(reader);
        self.commons.push(common);
    }

    /// The last `n`, or all.
    fn take_last(&mut self, n: usize) -> Self {
        let left = self.len().saturating_sub(n);
        Self { readers: self.readers.split_off(left), commons: self.commons.split_off(left) }
    }

    fn append(&mut self, mut other: Self) {
        self.readers.append(&mut other.readers);
        self.commons.append(&mut other.commons);
    }
}

impl Common {
    pub(crate) fn new(handle: Handle, space: AddressSpaceId, marks: Option<Arc<Marks>>) -> Arc<Self> {
        static SPACES: AtomicU64 = AtomicU64::new(0);
        Arc::new(Self {
            number: SPACES.fetch_add(1, Ordering::Relaxed),
            handle,
            space,
            marks,
            table_is_gone: AtomicBool::new(false),
            depot: Apart(Mutex::new(Tickets::default())),
        })
    }

    fn depot(&self) -> MutexGuard<'_, Tickets> {
        self.depot.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing more will be published.
    pub(crate) fn table_goes(&self) {
        let tickets = {
            let mut depot = self.depot();
            self.table_is_gone.store(true, Ordering::SeqCst);
            std::mem::take(&mut *depot)
        };
        drop(tickets);
        let own = STOCKS.try_with(|stocks| sweep(&mut stocks.borrow_mut()));
        drop(own);
    }

    fn is_gone(&self) -> bool {
        self.table_is_gone.load(Ordering::Relaxed)
    }
}

/// A thread's readers for one space. An address is not used again while there is a ticket with it, and without a
/// ticket the stock may be anyone's.
struct Stock {
    of: *const Common,
    tickets: Tickets,
}

thread_local! {
    /// Tickets are never dropped while this is borrowed: what they keep alive may run code of the caller, who
    /// may come here again.
    static STOCKS: RefCell<Vec<Stock>> = const { RefCell::new(Vec::new()) };
}

/// A reader from the stock of this thread.
#[inline]
pub(crate) fn take(common: &Arc<Common>) -> (ParkedReader, Arc<Common>) {
    let here = STOCKS.try_with(|stocks| {
        let stocks = &mut *stocks.borrow_mut();
        let stock = stocks.iter_mut().find(|stock| stock.of == Arc::as_ptr(common))?;
        stock.tickets.pop()
    });
    match here {
        Ok(Some(ticket)) => ticket,
        _ => fetch(common),
    }
}

/// A reader from the depot, or a new one.
#[cold]
#[inline(never)]
fn fetch(common: &Arc<Common>) -> (ParkedReader, Arc<Common>) {
    let mut fetched = common.depot().take_last(STOCK / 2);
    let ticket = fetched.pop().unwrap_or_else(|| {
        let reader = common.handle.reader().expect("out of memory for a reader of the slot table");
        (reader.park(), common.clone())
    });
    let mut fetched = Some(fetched);
    let stale = STOCKS.try_with(|stocks| {
        let stocks = &mut *stocks.borrow_mut();
        let stale = sweep(stocks);
        fetched.take().into_iter().for_each(|fetched| stock_of(stocks, common).tickets.append(fetched));
        stale
    });
    drop((stale, fetched));
    ticket
}

/// Leaves a reader to this thread.
#[inline]
pub(crate) fn put(reader: ParkedReader, common: Arc<Common>) {
    let mut ticket = Some((reader, common));
    let _ = STOCKS.try_with(|stocks| {
        let stocks = &mut *stocks.borrow_mut();
        if let Some((reader, common)) = ticket.take() {
            let of = Arc::as_ptr(&common);
            match stocks.iter_mut().find(|stock| stock.of == of) {
                Some(stock) if stock.tickets.len() < STOCK && !common.is_gone() => {
                    stock.tickets.push(reader, common);
                }
                _ => ticket = Some((reader, common)),
            }
        }
    });
    if let Some((reader, common)) = ticket {
        hand_over(reader, common);
    }
}

/// Makes room for a reader, here or in the depot.
#[cold]
#[inline(never)]
fn hand_over(reader: ParkedReader, common: Arc<Common>) {
    let mut left = Tickets::default();
    left.push(reader, common.clone());
    let stale = STOCKS.try_with(|stocks| {
        let stocks = &mut *stocks.borrow_mut();
        let stale = sweep(stocks);
        if !common.is_gone() {
            let stock = stock_of(stocks, &common);
            if stock.tickets.len() >= STOCK {
                left.append(stock.tickets.take_last(STOCK / 2));
            } else {
                stock.tickets.append(std::mem::take(&mut left));
            }
        }
        stale
    });
    {
        // Looked at under the lock: once it is gone, nothing comes to the depot any more.
        let mut depot = common.depot();
        if !common.is_gone() {
            let room = DEPOT.saturating_sub(depot.len());
            depot.append(left.take_last(room));
        }
    }
    drop((stale, left));
}

fn stock_of<'a>(stocks: &'a mut Vec<Stock>, common: &Arc<Common>) -> &'a mut Stock {
    let of = Arc::as_ptr(common);
    let at = stocks.iter().position(|stock| stock.of == of).unwrap_or_else(|| {
        stocks.push(Stock { of, tickets: Tickets::with_capacity(STOCK) });
        stocks.len() - 1
    });
    &mut stocks[at]
}

/// Takes the stocks away whose tables are gone, and empty ones. The caller drops them.
fn sweep(stocks: &mut Vec<Stock>) -> Vec<Stock> {
    let is_stale = |stock: &Stock| stock.tickets.commons.first().is_none_or(|common| common.is_gone());
    if !stocks.iter().any(is_stale) {
        return Vec::new();
    }
    let (stale, kept) = std::mem::take(stocks).into_iter().partition(is_stale);
    *stocks = kept;
    stale
}
