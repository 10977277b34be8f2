//! The container that kernel, initramfs and the guest's command line come in: a cpio archive ("newc"), because a PVH start has one
//! module only.

/// Finds a file in an archive.
pub(crate) fn find<'a>(archive: &'a [u8], name: &str) -> Option<&'a [u8]> {
    let mut rest = archive;
    loop {
        let header = rest.get(..110).filter(|header| header.starts_with(b"070701"))?;
        let field = |number: usize| {
            let digits = core::str::from_utf8(&header[6 + number * 8..14 + number * 8]).ok()?;
            usize::from_str_radix(digits, 16).ok()
        };
        let (size, name_size) = (field(6)?, field(11)?);
        let data = (110 + name_size).next_multiple_of(4);
        let found = rest.get(110..(110 + name_size).checked_sub(1)?)?;
        let contents = rest.get(data..data.checked_add(size)?)?;
        if found == name.as_bytes() {
            return Some(contents);
        }
        if found == b"TRAILER!!!" {
            return None;
        }
        rest = rest.get((data + size).next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use alloc::format;
    use alloc::vec::Vec;

    use super::*;

    fn entry(archive: &mut Vec<u8>, name: &str, contents: &[u8]) {
        let fields = [0, 0, 0, 0, 0, 0, contents.len(), 0, 0, 0, 0, name.len() + 1, 0];
        archive.extend(b"070701");
        fields.iter().for_each(|field| archive.extend(format!("{field:08x}").bytes()));
        archive.extend(name.bytes().chain([0]));
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend(contents);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }

    #[test]
    fn files_are_found_and_cut_archives_are_refused() {
        let mut archive = Vec::new();
        entry(&mut archive, "kernel", b"12345");
        entry(&mut archive, "initramfs", b"6789");
        entry(&mut archive, "TRAILER!!!", b"");
        assert_eq!(find(&archive, "kernel"), Some(&b"12345"[..]));
        assert_eq!(find(&archive, "initramfs"), Some(&b"6789"[..]));
        assert_eq!(find(&archive, "other"), None);
        for length in 0..archive.len() {
            let cut = &archive[..length];
            assert!(find(cut, "initramfs").is_none_or(|found| found == b"6789"), "{length}");
            assert_eq!(find(cut, "other"), None);
        }
    }
}
