//! The host's pools of huge pages.

use std::fmt;
use std::path::PathBuf;

use rustix::fs::MemfdFlags;

/// A size of huge pages that a pool of the host can have.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum HugePage {
    /// 2 MiB.
    M2,
    /// 1 GiB.
    G1,
}

impl HugePage {
    /// The size in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        match self {
            Self::M2 => 2 << 20,
            Self::G1 => 1 << 30,
        }
    }

    /// The size with this many bytes.
    pub(crate) fn of(bytes: u64) -> Option<Self> {
        [Self::M2, Self::G1].into_iter().find(|page| page.bytes() == bytes)
    }

    /// How many are free and not promised to somebody; `None` where the host has no pages of this size.
    ///
    /// Others take from the pool as well, so a mapping may fail all the same.
    #[must_use]
    pub fn available(self) -> Option<u64> {
        let count = |name| -> Option<u64> {
            std::fs::read_to_string(self.pool().join(name)).ok()?.trim().parse().ok()
        };
        Some(count("free_hugepages")?.saturating_sub(count("resv_hugepages")?))
    }

    /// The file that says how many pages the pool has. `/proc/sys/vm/nr_hugepages` is the same number for the
    /// size that `/proc/meminfo` gives as `Hugepagesize`, which is 2 MiB on x86-64 unless the host was told otherwise.
    pub(crate) fn setting(self) -> String {
        match self {
            Self::M2 if default_size() == Some(Self::M2.bytes()) => "/proc/sys/vm/nr_hugepages".to_owned(),
            _ => self.pool().join("nr_hugepages").display().to_string(),
        }
    }

    fn pool(self) -> PathBuf {
        PathBuf::from(format!("/sys/kernel/mm/hugepages/hugepages-{}kB", self.bytes() >> 10))
    }

    pub(crate) const fn memfd_flags(self) -> MemfdFlags {
        match self {
            Self::M2 => MemfdFlags::HUGETLB.union(MemfdFlags::HUGE_2MB),
            Self::G1 => MemfdFlags::HUGETLB.union(MemfdFlags::HUGE_1GB),
        }
    }
}

fn default_size() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("Hugepagesize:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

impl fmt::Display for HugePage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::M2 => "2 MiB",
            Self::G1 => "1 GiB",
        })
    }
}
