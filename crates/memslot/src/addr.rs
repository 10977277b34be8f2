//! Addresses, page numbers and ranges of them.
//!
//! A guest has *guest physical addresses* ([`Gpa`], bytes) made of *guest frame numbers* ([`Gfn`], pages);
//! the process or hypervisor that backs them has *host virtual addresses* ([`Hva`], bytes). All three are
//! 64-bit numbers, and mixing them up is how memory maps go wrong, so each is a type of its own.
//!
//! Arithmetic is checked everywhere: an operation that would wrap returns `None`. Ranges are half open,
//! `[start, end)`, and are never inverted. Because the end is exclusive, the very last byte (or page) of a
//! 64-bit space cannot be part of a range; KVM refuses such a slot too (`gpa + size` must not reach 2^64).
//!
//! The size of a page is a value, [`PageSize`], not a constant: arm64 hosts use 16 and 64 KiB pages.

use core::fmt;

/// The size of a guest page, which is the host's base page size.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub enum PageSize {
    /// 4 KiB: x86-64, most arm64 and RISC-V hosts.
    #[default]
    K4,
    /// 16 KiB: some arm64 hosts.
    K16,
    /// 64 KiB: some arm64 and POWER hosts.
    K64,
}

impl PageSize {
    /// log2 of the size in bytes.
    #[inline]
    #[must_use]
    pub const fn shift(self) -> u32 {
        match self {
            Self::K4 => 12,
            Self::K16 => 14,
            Self::K64 => 16,
        }
    }

    /// The size in bytes.
    #[inline]
    #[must_use]
    pub const fn bytes(self) -> u64 {
        1 << self.shift()
    }

    /// The bytes that `pages` pages hold, or `None` beyond 2^64.
    ///
    /// ```
    /// use memslot::PageSize;
    /// assert_eq!(PageSize::K4.bytes_of(3), Some(0x3000));
    /// assert_eq!(PageSize::K4.bytes_of(1 << 52), None);
    /// ```
    #[inline]
    #[must_use]
    pub const fn bytes_of(self, pages: u64) -> Option<u64> {
        pages.checked_mul(self.bytes())
    }

    /// Whether `value` (an address or a length in bytes) is a multiple of the page size.
    #[inline]
    #[must_use]
    pub const fn divides(self, value: u64) -> bool {
        value & (self.bytes() - 1) == 0
    }
}

macro_rules! address {
    ($(#[$doc:meta])* $name:ident, $range:ident, $(#[$range_doc:meta])*) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(u64);

        impl $name {
            /// Wraps a raw value; every 64-bit value is valid.
            #[inline]
            #[must_use]
            pub const fn new(value: u64) -> Self {
                Self(value)
            }

            /// The raw value.
            #[inline]
            #[must_use]
            pub const fn get(self) -> u64 {
                self.0
            }

            /// `self + n`, or `None` where that would wrap.
            #[inline]
            #[must_use]
            pub const fn checked_add(self, n: u64) -> Option<Self> {
                match self.0.checked_add(n) {
                    Some(value) => Some(Self(value)),
                    None => None,
                }
            }

            /// `self - n`, or `None` below zero.
            #[inline]
            #[must_use]
            pub const fn checked_sub(self, n: u64) -> Option<Self> {
                match self.0.checked_sub(n) {
                    Some(value) => Some(Self(value)),
                    None => None,
                }
            }

            /// How far `self` lies behind `origin`, or `None` where it lies before it.
            #[inline]
            #[must_use]
            pub const fn offset_from(self, origin: Self) -> Option<u64> {
                self.0.checked_sub(origin.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }

        $(#[$range_doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $range {
            start: $name,
            end: $name,
        }

        impl $range {
            /// `[start, end)`, or `None` when `end` lies before `start`.
            #[inline]
            #[must_use]
            pub const fn new(start: $name, end: $name) -> Option<Self> {
                if end.0 < start.0 { None } else { Some(Self { start, end }) }
            }

            /// `[start, start + len)`, or `None` when the end would pass 2^64 - 1.
            #[inline]
            #[must_use]
            pub const fn with_len(start: $name, len: u64) -> Option<Self> {
                match start.checked_add(len) {
                    Some(end) => Some(Self { start, end }),
                    None => None,
                }
            }

            /// The first address of the range.
            #[inline]
            #[must_use]
            pub const fn start(&self) -> $name {
                self.start
            }

            /// The first address behind the range.
            #[inline]
            #[must_use]
            pub const fn end(&self) -> $name {
                self.end
            }

            /// The length, in the unit of the address type.
            #[inline]
            #[must_use]
            pub const fn len(&self) -> u64 {
                self.end.0 - self.start.0
            }

            /// Whether nothing is in the range.
            #[inline]
            #[must_use]
            pub const fn is_empty(&self) -> bool {
                self.start.0 == self.end.0
            }

            /// Whether `address` is in the range.
            #[inline]
            #[must_use]
            pub const fn contains(&self, address: $name) -> bool {
                self.start.0 <= address.0 && address.0 < self.end.0
            }

            /// Whether every address of `other` is in this range. An empty range is inside every range.
            #[inline]
            #[must_use]
            pub const fn contains_range(&self, other: &Self) -> bool {
                other.is_empty() || (self.start.0 <= other.start.0 && other.end.0 <= self.end.0)
            }

            /// Whether some address is in both. An empty range overlaps nothing.
            #[inline]
            #[must_use]
            pub const fn overlaps(&self, other: &Self) -> bool {
                self.start.0 < other.end.0
                    && other.start.0 < self.end.0
                    && !self.is_empty()
                    && !other.is_empty()
            }

            /// What both have in common, or `None` where that is nothing.
            #[inline]
            #[must_use]
            pub fn intersect(&self, other: &Self) -> Option<Self> {
                self.overlaps(other).then(|| Self {
                    start: self.start.max(other.start),
                    end: self.end.min(other.end),
                })
            }
        }

        impl fmt::Display for $range {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "[{:#x}, {:#x})", self.start.0, self.end.0)
            }
        }

        impl fmt::Debug for $range {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($range), "[{:#x}, {:#x})"), self.start.0, self.end.0)
            }
        }
    };
}

address! {
    /// A guest physical address, in bytes.
    ///
    /// ```
    /// use memslot::{Gfn, Gpa, PageSize};
    /// assert_eq!(Gpa::new(0x10_0fff).gfn(PageSize::K4), Gfn::new(0x100));
    /// assert_eq!(Gpa::new(u64::MAX).checked_add(1), None);
    /// ```
    Gpa, GpaRange,
    /// A half-open range of guest physical addresses, in bytes.
}

address! {
    /// A guest frame number: a guest physical address divided by the page size.
    Gfn, GfnRange,
    /// A half-open range of guest frame numbers, in pages.
    ///
    /// ```
    /// use memslot::{Gfn, GfnRange};
    /// let ram = GfnRange::with_len(Gfn::new(0x100), 16).unwrap();
    /// assert_eq!(ram.end(), Gfn::new(0x110));
    /// assert!(ram.contains(Gfn::new(0x10f)) && !ram.contains(ram.end()));
    /// ```
}

address! {
    /// A host virtual address, in bytes: where the VMM (or the hypervisor) sees a guest's memory.
    Hva, HvaRange,
    /// A half-open range of host virtual addresses, in bytes.
}

impl Gpa {
    /// The frame this address lies in.
    #[inline]
    #[must_use]
    pub const fn gfn(self, page: PageSize) -> Gfn {
        Gfn(self.0 >> page.shift())
    }

    /// The bytes between the start of the address's frame and the address.
    #[inline]
    #[must_use]
    pub const fn offset_in_page(self, page: PageSize) -> u64 {
        self.0 & (page.bytes() - 1)
    }
}

impl Gfn {
    /// The address of the frame's first byte, or `None` where a 64-bit address cannot express it.
    ///
    /// ```
    /// use memslot::{Gfn, Gpa, PageSize};
    /// assert_eq!(Gfn::new(0x100).gpa(PageSize::K4), Some(Gpa::new(0x10_0000)));
    /// assert_eq!(Gfn::new(1 << 52).gpa(PageSize::K4), None);
    /// ```
    #[inline]
    #[must_use]
    pub const fn gpa(self, page: PageSize) -> Option<Gpa> {
        match page.bytes_of(self.0) {
            Some(value) => Some(Gpa(value)),
            None => None,
        }
    }
}

impl GfnRange {
    /// The bytes these frames hold, or `None` where the end passes 2^64 - 1.
    #[inline]
    #[must_use]
    pub fn gpas(&self, page: PageSize) -> Option<GpaRange> {
        GpaRange::new(self.start.gpa(page)?, self.end.gpa(page)?)
    }
}

impl GpaRange {
    /// The frames that these bytes touch: the start rounded down, the end rounded up.
    #[inline]
    #[must_use]
    pub fn gfns(&self, page: PageSize) -> GfnRange {
        let end = self.end.0 / page.bytes() + u64::from(!page.divides(self.end.0));
        GfnRange { start: self.start.gfn(page), end: Gfn(end) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_edges_of_64_bits() {
        let top = Gpa::new(u64::MAX);
        assert_eq!(top.checked_add(1), None);
        assert_eq!(Gpa::new(0).checked_sub(1), None);
        assert_eq!(GpaRange::with_len(top, 1), None, "2^64 is no address");
        let last = GpaRange::with_len(Gpa::new(u64::MAX - 1), 1).unwrap();
        assert!(last.contains(Gpa::new(u64::MAX - 1)) && !last.contains(top));
        assert_eq!(GpaRange::new(top, Gpa::new(0)), None);
        assert_eq!(GpaRange::new(Gpa::new(0), top).unwrap().len(), u64::MAX);
        for page in [PageSize::K4, PageSize::K16, PageSize::K64] {
            let last_gfn = top.gfn(page);
            assert_eq!(last_gfn.gpa(page).unwrap().get(), u64::MAX - (page.bytes() - 1));
            assert_eq!(last_gfn.checked_add(1).unwrap().gpa(page), None);
            let all = GpaRange::new(Gpa::new(0), top).unwrap().gfns(page);
            assert_eq!(all.len(), 1 << (64 - page.shift()));
        }
    }

    #[test]
    fn an_empty_range_holds_and_overlaps_nothing() {
        let empty = GfnRange::with_len(Gfn::new(5), 0).unwrap();
        let around = GfnRange::with_len(Gfn::new(0), 10).unwrap();
        assert!(empty.is_empty() && !empty.contains(Gfn::new(5)));
        assert!(!empty.overlaps(&around) && !around.overlaps(&empty));
        assert_eq!(around.intersect(&empty), None);
        assert!(around.contains_range(&empty));
    }

    #[test]
    fn neighbours_do_not_overlap() {
        let low = GfnRange::with_len(Gfn::new(0), 16).unwrap();
        let high = GfnRange::with_len(Gfn::new(16), 16).unwrap();
        let across = GfnRange::with_len(Gfn::new(15), 2).unwrap();
        assert!(!low.overlaps(&high));
        assert_eq!(low.intersect(&across).unwrap().len(), 1);
        assert_eq!(high.intersect(&across).unwrap().start(), Gfn::new(16));
    }

    #[test]
    fn bytes_round_outwards_to_frames() {
        let bytes = GpaRange::new(Gpa::new(0xfff), Gpa::new(0x1001)).unwrap();
        assert_eq!(bytes.gfns(PageSize::K4), GfnRange::with_len(Gfn::new(0), 2).unwrap());
    }
}
