//! What `memslot-backing` knows of the memory behind a slot.

use std::fs::File;
use std::sync::{Arc, Weak};

use memslot::{ListenerError, Slot};
use memslot_backing::{Backings, Memory};
use vm_memory::FileOffset;

use crate::host::HostMemory;

/// Describes slots by what `backings` know: who keeps the memory mapped, which file it is, and whether that is of
/// hugetlbfs. For [`Native::describe`](crate::Native::describe) and [`Bridge::describe`](crate::Bridge::describe).
///
/// A bridge needs it: a guard of a `GuestMemoryAtomic` holds no version of the table, so the table alone does not
/// keep the memory behind an old map. Slots on memory that was not adopted are refused.
pub fn backed(backings: &Backings) -> impl FnMut(&Slot) -> Result<HostMemory, ListenerError> + Send + use<> {
    let backings = backings.clone();
    let mut files: Vec<(Weak<Memory>, Arc<File>)> = Vec::new();
    move |slot| {
        let unknown = || format!("{slot} stands on memory that was not adopted");
        let hva = slot.hva().ok_or_else(unknown)?;
        let memory = backings.memory_at(hva).ok_or_else(unknown)?;
        let mut host = HostMemory::new().with_hugetlbfs(memory.is_hugetlb());
        if let Some((file, start)) = memory.file_offset() {
            files.retain(|(of, _)| of.strong_count() > 0);
            // One descriptor for each memory, however many slots are on it.
            let known = files.iter().find(|(of, _)| of.as_ptr() == Arc::as_ptr(&memory));
            let file = match known {
                Some((_, file)) => Arc::clone(file),
                None => {
                    let file = Arc::new(File::from(file.try_clone_to_owned()?));
                    files.push((Arc::downgrade(&memory), Arc::clone(&file)));
                    file
                }
            };
            let within = hva.offset_from(memory.hva()).unwrap_or_default();
            host = host.with_file_offset(FileOffset::from_arc(file, start + within));
        }
        Ok(host.keeping(memory))
    }
}
