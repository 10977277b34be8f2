//! Writes cpio archives ("newc"): initramfs images, and the container that the hypervisor gets kernel and initramfs in.

/// An archive that grows.
#[derive(Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: usize,
}

impl Archive {
    /// Adds a file.
    pub(crate) fn file(self, name: &str, mode: usize, contents: &[u8]) -> Self {
        self.entry(name, 0o100_000 | mode, contents, (0, 0))
    }

    /// Adds a folder.
    pub(crate) fn folder(self, name: &str) -> Self {
        self.entry(name, 0o040_755, &[], (0, 0))
    }

    /// Adds a character device.
    pub(crate) fn device(self, name: &str, major: usize, minor: usize) -> Self {
        self.entry(name, 0o020_600, &[], (major, minor))
    }

    /// The archive, complete.
    pub(crate) fn finish(self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[], (0, 0)).bytes
    }

    fn entry(mut self, name: &str, mode: usize, contents: &[u8], device: (usize, usize)) -> Self {
        self.entries += 1;
        let (length, name_length) = (contents.len(), name.len() + 1);
        // Number, mode, owner, group, links, time, length, device, device it stands for, length of the name, checksum.
        let fields = [self.entries, mode, 0, 0, 1, 0, length, 0, 0, device.0, device.1, name_length, 0];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes().chain([0]));
        self.align();
        self.bytes.extend(contents);
        self.align();
        self
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_say_what_they_are() {
        let bytes = Archive::default()
            .folder("dev")
            .device("dev/console", 5, 1)
            .file("init", 0o755, b"12345")
            .finish();
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.starts_with("07070100000001000041ed"), "{text}");
        assert_eq!(text.matches("070701").count(), 4);
        assert!(text.match_indices("070701").all(|(at, _)| at % 4 == 0));
        assert!(text.contains("init\0\0") && text.contains("12345\0\0\x00070701"), "{text:?}");
    }
}
