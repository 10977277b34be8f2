//! How memory is asked for.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use memslot::Gpa;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fstat, fstatfs, ftruncate, memfd_create};

use crate::error::MemoryError;
use crate::guest_memfd::GuestMemfd;
use crate::huge::HugePage;
use crate::mapping::{Mapping, Place, What};
use crate::memory::{Memory, MemoryKind, Part};

/// `f_type` of a hugetlbfs.
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// Where memory is aligned unless something else is asked for: 2 MiB, a huge page of most hosts.
const ALIGNMENT: u64 = 2 << 20;

/// Who sees what is written to a file's memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Sharing {
    /// Everybody who maps or reads the file.
    Shared,
    /// The process alone: a page is copied when it is written.
    Private,
}

/// Memory that is asked for and not mapped yet; [`map`](Self::map) does it.
///
/// ```
/// use memslot::Gpa;
/// use memslot_backing::Memory;
/// // For guest memory that begins 16 MiB above 4 GiB: huge pages of guest and host lie alike, up to those of 1 GiB.
/// let gpa = Gpa::new((4 << 30) + (16 << 20));
/// let memory = Memory::anonymous(8 << 20).alignment(1 << 30).congruent_to(gpa).huge_pages(true).map()?;
/// assert_eq!((memory.hva().get() - gpa.get()) % (1 << 30), 0);
///
/// let error = Memory::anonymous(5000).map().unwrap_err();
/// assert!(error.to_string().ends_with("the nearest are 0x1000 and 0x2000"), "{error}");
/// # Ok::<(), memslot_backing::MemoryError>(())
/// ```
#[derive(Debug)]
#[must_use = "nothing is mapped before `map`"]
pub struct MemoryBuilder {
    source: Source,
    bytes: u64,
    alignment: u64,
    congruent_to: Gpa,
    guards: bool,
    huge_pages: Option<bool>,
    prefault: bool,
    no_reserve: bool,
    exclude_from_dumps: bool,
}

#[derive(Debug)]
enum Source {
    Anonymous,
    Memfd { name: String, huge: Option<HugePage> },
    File { file: OwnedFd, offset: u64, sharing: Sharing },
    GuestMemfd { file: io::Result<OwnedFd>, offset: u64 },
}

impl Memory {
    /// Memory of this process alone: the cheapest, and what most guests run on.
    pub const fn anonymous(bytes: u64) -> MemoryBuilder {
        MemoryBuilder::new(Source::Anonymous, bytes)
    }

    /// Memory in a memfd of its own, which a vhost-user backend or another process can map too. The name shows up in
    /// `/proc/*/maps`. The file's size is sealed, so that nobody can cut off what a guest uses.
    pub fn memfd(name: &str, bytes: u64) -> MemoryBuilder {
        MemoryBuilder::new(Source::Memfd { name: name.to_owned(), huge: None }, bytes)
    }

    /// Huge pages of one of the host's pools, in a memfd of its own: never split, never swapped, never short of a page
    /// later on (unless [`no_reserve`](MemoryBuilder::no_reserve) is set).
    pub fn huge(page: HugePage, bytes: u64) -> MemoryBuilder {
        let name = format!("huge-{}k", page.bytes() >> 10);
        MemoryBuilder::new(Source::Memfd { name, huge: Some(page) }, bytes)
    }

    /// `bytes` of a file from `offset` on, both multiples of the page size. The file must be that long, and stay so: an
    /// access behind its end is a `SIGBUS`.
    ///
    /// Shared, the file must be open for reading and writing; private, for reading. A file of a hugetlbfs gives huge
    /// pages, shared only.
    pub fn file(file: impl Into<OwnedFd>, offset: u64, bytes: u64, sharing: Sharing) -> MemoryBuilder {
        MemoryBuilder::new(Source::File { file: file.into(), offset, sharing }, bytes)
    }

    /// `bytes` of a guest_memfd from `offset` on, for the host to read and write. Its flags must have
    /// [`MMAP`](crate::GuestMemfdFlags::MMAP) and, unless the guest shares the pages in another way,
    /// [`INIT_SHARED`](crate::GuestMemfdFlags::INIT_SHARED): an access to a private page is a `SIGBUS`.
    pub fn guest_memfd(file: &GuestMemfd, offset: u64, bytes: u64) -> MemoryBuilder {
        let file = file.as_fd().try_clone_to_owned();
        MemoryBuilder::new(Source::GuestMemfd { file, offset }, bytes)
    }
}

impl MemoryBuilder {
    const fn new(source: Source, bytes: u64) -> Self {
        Self {
            source,
            bytes,
            alignment: ALIGNMENT,
            congruent_to: Gpa::new(0),
            guards: true,
            huge_pages: None,
            prefault: false,
            no_reserve: false,
            exclude_from_dumps: false,
        }
    }

    /// The alignment of the first byte, a power of two and at least a page; 2 MiB unless set. Pages of a pool are always
    /// aligned to their own size at least.
    pub const fn alignment(mut self, bytes: u64) -> Self {
        self.alignment = bytes;
        self
    }

    /// Puts the memory where its host addresses and the guest's, from `gpa` on, have the same remainder modulo the
    /// alignment (instead of 0). Then a huge page of the guest is a huge page of the host.
    pub const fn congruent_to(mut self, gpa: Gpa) -> Self {
        self.congruent_to = gpa;
        self
    }

    /// Whether 64 KiB without access lie before and behind the memory, so that a stray access there faults and does not
    /// hit something else; on unless set. They cost addresses and up to two of the process's mappings
    /// (`/proc/sys/vm/max_map_count`), no memory.
    ///
    /// Without them the kernel keeps anonymous neighbours as one mapping, which it does not cut in three when the process
    /// has as many as it may have: of memory that goes then, the pages are freed and the addresses are not.
    pub const fn guard_pages(mut self, wanted: bool) -> Self {
        self.guards = wanted;
        self
    }

    /// As [`Memory::advise_huge`]; the host decides unless set.
    pub const fn huge_pages(mut self, wanted: bool) -> Self {
        self.huge_pages = Some(wanted);
        self
    }

    /// Makes every page present at once, as [`Memory::prefault`].
    pub const fn prefault(mut self) -> Self {
        self.prefault = true;
        self
    }

    /// Lets the host promise more memory than it has (`MAP_NORESERVE`). When it runs out, the process is killed; where
    /// the pages are those of a pool, an access is a `SIGBUS`.
    pub const fn no_reserve(mut self) -> Self {
        self.no_reserve = true;
        self
    }

    /// Leaves the memory out of core dumps (`MADV_DONTDUMP`).
    pub const fn exclude_from_dumps(mut self) -> Self {
        self.exclude_from_dumps = true;
        self
    }

    /// Maps the memory.
    ///
    /// # Errors
    /// Any [`MemoryError`]; nothing is left behind then.
    pub fn map(self) -> Result<Memory, MemoryError> {
        let (kind, bytes) = (self.source.kind(), self.bytes);
        let pages = self.source.pages(bytes)?;
        if kind == MemoryKind::PrivateFile && pages.from_pool {
            let instead = "copies would need a second huge page for each; map it shared";
            return Err(MemoryError::Unsupported { operation: "a file of a hugetlbfs", kind, instead });
        }
        let place = self.place(pages.bytes)?;
        let (no_reserve, exclude_from_dumps) = (self.no_reserve, self.exclude_from_dumps);
        let file = self.source.open(bytes, pages.bytes)?;
        let what = match &file {
            None => What::Anonymous,
            Some((file, offset)) if kind == MemoryKind::PrivateFile => What::Private(file.as_fd(), *offset),
            Some((file, offset)) => What::Shared(file.as_fd(), *offset),
        };
        let length = usize::try_from(bytes).unwrap_or(usize::MAX);
        let mapping = Mapping::new(what, length, no_reserve, place).map_err(|source| {
            let pool = if pages.from_pool { HugePage::of(pages.bytes) } else { None };
            match pool {
                Some(pool) => no_huge_pages(pool, "mmap", bytes, source),
                None => MemoryError::Call { call: "mmap", kind, bytes, source },
            }
        })?;
        let memory =
            Memory { mapping, kind, file, page: pages.bytes, hugetlb: pages.from_pool, exclude_from_dumps };
        if let Some(wanted) = self.huge_pages {
            memory.advise_huge(wanted)?;
        }
        if exclude_from_dumps {
            memory.keep_out_of_dumps(Part { offset: 0, bytes: length })?;
        }
        if self.prefault {
            memory.prefault(..)?;
        }
        Ok(memory)
    }

    /// Where it shall lie, if that is possible with pages of this size.
    fn place(&self, page: u64) -> Result<Place, MemoryError> {
        if self.bytes == 0 {
            return Err(MemoryError::Empty { page });
        }
        multiple_of(page, "the size", self.bytes)?;
        let asked = self.alignment;
        let base = rustix::param::page_size() as u64;
        let bad = MemoryError::BadAlignment { asked, page: base };
        if !asked.is_power_of_two() || asked < base {
            return Err(bad);
        }
        let alignment = asked.max(page);
        let remainder = self.congruent_to.get() % alignment;
        multiple_of(page, "the guest address that the memory shall be congruent to,", remainder)?;
        let to_usize =
            |value| usize::try_from(value).map_err(|_| MemoryError::BadAlignment { asked, page: base });
        Ok(Place { alignment: to_usize(alignment)?, remainder: to_usize(remainder)?, guards: self.guards })
    }
}

/// The pages that memory will be made of.
struct Pages {
    bytes: u64,
    from_pool: bool,
}

impl Source {
    const fn kind(&self) -> MemoryKind {
        match self {
            Self::Anonymous => MemoryKind::Anonymous,
            Self::Memfd { .. } => MemoryKind::Memfd,
            Self::File { sharing: Sharing::Shared, .. } => MemoryKind::SharedFile,
            Self::File { sharing: Sharing::Private, .. } => MemoryKind::PrivateFile,
            Self::GuestMemfd { .. } => MemoryKind::GuestMemfd,
        }
    }

    /// `bytes` is for the error only.
    fn pages(&self, bytes: u64) -> Result<Pages, MemoryError> {
        let base = Pages { bytes: rustix::param::page_size() as u64, from_pool: false };
        Ok(match self {
            Self::Memfd { huge: Some(page), .. } => Pages { bytes: page.bytes(), from_pool: true },
            Self::File { file, .. } => {
                let system = fstatfs(file).map_err(|error| MemoryError::Call {
                    call: "fstatfs",
                    kind: self.kind(),
                    bytes,
                    source: error.into(),
                })?;
                match u64::try_from(system.f_bsize) {
                    Ok(bytes) if u64::try_from(system.f_type) == Ok(HUGETLBFS_MAGIC) => {
                        Pages { bytes, from_pool: true }
                    }
                    _ => base,
                }
            }
            Self::Anonymous | Self::Memfd { huge: None, .. } | Self::GuestMemfd { .. } => base,
        })
    }

    /// The file, and where in it the memory begins.
    fn open(self, bytes: u64, page: u64) -> Result<Option<(OwnedFd, u64)>, MemoryError> {
        let kind = self.kind();
        let (file, offset) = match self {
            Self::Anonymous => return Ok(None),
            Self::Memfd { name, huge } => return Ok(Some((memfd(&name, huge, bytes)?, 0))),
            Self::File { file, offset, .. } => (Ok(file), offset),
            Self::GuestMemfd { file, offset } => (file, offset),
        };
        let failed = |call| move |source| MemoryError::Call { call, kind, bytes, source };
        let file = file.map_err(failed("dup"))?;
        multiple_of(page, "the offset in the file", offset)?;
        let size = fstat(&file).map_err(|error| failed("fstat")(error.into()))?.st_size;
        let has = u64::try_from(size).unwrap_or(0);
        match offset.checked_add(bytes) {
            Some(needs) if needs <= has => Ok(Some((file, offset))),
            needs => Err(MemoryError::FileTooShort { has, needs: needs.unwrap_or(u64::MAX) }),
        }
    }
}

/// A memfd of this size, which stays as it is.
fn memfd(name: &str, huge: Option<HugePage>, bytes: u64) -> Result<OwnedFd, MemoryError> {
    let failed = |call| {
        move |error: rustix::io::Errno| match huge {
            Some(page) => no_huge_pages(page, call, bytes, error.into()),
            None => MemoryError::Call { call, kind: MemoryKind::Memfd, bytes, source: error.into() },
        }
    };
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let huge_flags = huge.map_or(MemfdFlags::empty(), HugePage::memfd_flags);
    let file = memfd_create(name, flags | huge_flags).map_err(failed("memfd_create"))?;
    ftruncate(&file, bytes).map_err(failed("ftruncate"))?;
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    fcntl_add_seals(&file, seals).map_err(failed("fcntl(F_ADD_SEALS)"))?;
    Ok(file)
}

/// The error of a call about pages of a pool: that there are too few, if there are.
fn no_huge_pages(page: HugePage, call: &'static str, bytes: u64, source: io::Error) -> MemoryError {
    let (wanted, available) = (bytes / page.bytes(), page.available());
    if available.is_some_and(|available| available >= wanted) {
        return MemoryError::Call { call, kind: MemoryKind::Memfd, bytes, source };
    }
    MemoryError::NoHugePages { page, wanted, available, setting: page.setting(), source }
}

fn multiple_of(multiple: u64, what: &'static str, value: u64) -> Result<(), MemoryError> {
    if value % multiple == 0 { Ok(()) } else { Err(MemoryError::Unaligned { what, value, multiple }) }
}
