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

#![expect(clippy::vec_box, reason = "a ticket goes into a guard in its box")]

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memslot::{AddressSpaceId, Handle, Holder, Snapshot};

use crate::log::Marks;

/// Readers that a thread keeps for a space.
const STOCK: usize = 16;
/// Readers that a depot keeps.
const DEPOT: usize = 1024;

/// What a space, its guards and its listener share.
pub(crate) struct Common {
    /// A number that no two spaces have.
    pub(crate) number: u64,
    pub(crate) handle: Handle,
    pub(crate) space: AddressSpaceId,
    pub(crate) marks: Option<Arc<Marks>>,
    table_is_gone: AtomicBool,
    depot: Apart<Mutex<Vec<Box<Ticket>>>>,
}

/// Written now and then, so it does not share the line of what every guard reads.
#[repr(align(128))]
struct Apart<T>(T);

/// What holds a version, and what else a guard keeps alive. All of it is in stock together, so that a guard counts
/// nothing, and in a box, so that a guard is small: a device moves it into each descriptor chain.
pub(crate) struct Ticket {
    pub(crate) held: Held,
    pub(crate) common: Arc<Common>,
}

/// What holds the version.
pub(crate) enum Held {
    /// Holds one, or waits in a stock.
    Reader(Holder),
    Snapshot(Snapshot),
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
            depot: Apart(Mutex::new(Vec::new())),
        })
    }

    fn depot(&self) -> MutexGuard<'_, Vec<Box<Ticket>>> {
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
    tickets: Vec<Box<Ticket>>,
}

thread_local! {
    /// Tickets are never dropped while this is borrowed: what they keep alive may run code of the caller, who
    /// may come here again.
    static STOCKS: RefCell<Vec<Stock>> = const { RefCell::new(Vec::new()) };
}

/// A reader from the stock of this thread.
#[inline]
pub(crate) fn take(common: &Arc<Common>) -> Box<Ticket> {
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
fn fetch(common: &Arc<Common>) -> Box<Ticket> {
    let mut fetched = {
        let mut depot = common.depot();
        let left = depot.len().saturating_sub(STOCK / 2);
        depot.split_off(left)
    };
    let ticket = fetched.pop().unwrap_or_else(|| {
        let reader = common.handle.reader().expect("out of memory for a reader of the slot table");
        Box::new(Ticket { held: Held::Reader(reader.into_holder()), common: common.clone() })
    });
    let stale = STOCKS.try_with(|stocks| {
        let stocks = &mut *stocks.borrow_mut();
        let stale = sweep(stocks);
        stock_of(stocks, common).append(&mut fetched);
        stale
    });
    drop((stale, fetched));
    ticket
}

/// Lets go of the version, and leaves the reader to this thread if it is one.
#[inline]
pub(crate) fn put(mut ticket: Box<Ticket>) {
    match &mut ticket.held {
        Held::Reader(holder) => holder.release(),
        Held::Snapshot(_) => return drop(ticket),
    }
    let mut ticket = Some(ticket);
    let _ = STOCKS.try_with(|stocks| {
        let stocks = &mut *stocks.borrow_mut();
        if let Some(own) = ticket.take() {
            let of = Arc::as_ptr(&own.common);
            match stocks.iter_mut().find(|stock| stock.of == of) {
                Some(stock) if stock.tickets.len() < STOCK && !own.common.is_gone() => {
                    stock.tickets.push(own);
                }
                _ => ticket = Some(own),
            }
        }
    });
    ticket.into_iter().for_each(hand_over);
}

/// Makes room for a reader, here or in the depot.
#[cold]
#[inline(never)]
fn hand_over(ticket: Box<Ticket>) {
    let common = ticket.common.clone();
    let mut left = vec![ticket];
    let stale = STOCKS.try_with(|stocks| {
        let stocks = &mut *stocks.borrow_mut();
        let stale = sweep(stocks);
        if !common.is_gone() {
            let stock = stock_of(stocks, &common);
            if stock.len() >= STOCK {
                left.extend(stock.drain(STOCK / 2..));
            } else {
                stock.append(&mut left);
            }
        }
        stale
    });
    {
        // Looked at under the lock: once it is gone, nothing comes to the depot any more.
        let mut depot = common.depot();
        if !common.is_gone() {
            let room = DEPOT.saturating_sub(depot.len()).min(left.len());
            depot.extend(left.drain(..room));
        }
    }
    drop((stale, left));
}

fn stock_of<'a>(stocks: &'a mut Vec<Stock>, common: &Arc<Common>) -> &'a mut Vec<Box<Ticket>> {
    let of = Arc::as_ptr(common);
    let at = stocks.iter().position(|stock| stock.of == of).unwrap_or_else(|| {
        stocks.push(Stock { of, tickets: Vec::with_capacity(STOCK) });
        stocks.len() - 1
    });
    &mut stocks[at].tickets
}

/// Takes the stocks away whose tables are gone, and empty ones. The caller drops them.
fn sweep(stocks: &mut Vec<Stock>) -> Vec<Stock> {
    let is_stale = |stock: &Stock| stock.tickets.first().is_none_or(|ticket| ticket.common.is_gone());
    if !stocks.iter().any(is_stale) {
        return Vec::new();
    }
    let (stale, kept) = std::mem::take(stocks).into_iter().partition(is_stale);
    *stocks = kept;
    stale
}
