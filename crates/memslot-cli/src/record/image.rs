//! What an executable file is, by its first bytes.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use object::elf::{FileHeader32, FileHeader64};
use object::read::ReadCache;
use object::read::elf::{FileHeader, ProgramHeader};
use object::{Endianness, FileKind};

/// What an ELF file is for: class and machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kind {
    bits: u8,
    machine: u16,
}

/// An ELF file, as far as it matters here.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Elf {
    pub(super) kind: Kind,
    /// The dynamic loader; none in a static program.
    pub(super) interpreter: Option<PathBuf>,
}

/// What an executable file is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Image {
    Elf(Elf),
    /// With the interpreter of its first line.
    Script(PathBuf),
    Other,
}

impl Image {
    /// The error is in words, without the file's name.
    pub(super) fn read(path: &Path) -> Result<Self, String> {
        let mut file = File::open(path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => "is missing".to_owned(),
            _ => format!("cannot be read ({error})"),
        })?;
        let mut start = Vec::new();
        Read::by_ref(&mut file)
            .take(256)
            .read_to_end(&mut start)
            .map_err(|error| format!("cannot be read ({error})"))?;
        if let Some(line) = start.strip_prefix(b"#!") {
            return Ok(Image::Script(
                script_interpreter(line).ok_or("names no interpreter in its first line")?,
            ));
        }
        let data = &ReadCache::new(file);
        let broken = |error: object::Error| format!("is a broken ELF file ({error})");
        match FileKind::parse(data) {
            Ok(FileKind::Elf32) => Ok(Image::Elf(elf::<FileHeader32<Endianness>>(32, data).map_err(broken)?)),
            Ok(FileKind::Elf64) => Ok(Image::Elf(elf::<FileHeader64<Endianness>>(64, data).map_err(broken)?)),
            _ => Ok(Image::Other),
        }
    }
}

fn elf<H: FileHeader<Endian = Endianness>>(bits: u8, data: &ReadCache<File>) -> Result<Elf, object::Error> {
    let header = H::parse(data)?;
    let endian = header.endian()?;
    let mut interpreter = None;
    for segment in header.program_headers(endian, data)? {
        if let Some(path) = segment.interpreter(endian, data)? {
            interpreter = Some(PathBuf::from(OsStr::from_bytes(path)));
        }
    }
    Ok(Elf { kind: Kind { bits, machine: header.e_machine(endian).0 }, interpreter })
}

/// The interpreter in a script's first line, after the `#!`.
fn script_interpreter(line: &[u8]) -> Option<PathBuf> {
    let line = line.split(|byte| *byte == b'\n').next()?;
    let mut words =
        line.split(|byte| matches!(byte, b' ' | b'\t' | b'\r' | 0)).filter(|word| !word.is_empty());
    words.next().map(|word| PathBuf::from(OsStr::from_bytes(word)))
}

#[cfg(test)]
mod tests {
    use std::env;

    use super::*;

    #[test]
    fn first_lines_of_scripts() {
        for (line, expected) in [
            (&b"/bin/sh\n"[..], Some("/bin/sh")),
            (b" /usr/bin/env  bash -e\nexec qemu", Some("/usr/bin/env")),
            (b"\t/bin/sh", Some("/bin/sh")),
            (b"\n/bin/sh", None),
            (b"", None),
        ] {
            assert_eq!(script_interpreter(line).as_deref(), expected.map(Path::new), "{line:?}");
        }
    }

    #[test]
    fn this_test_is_dynamic() {
        let ours = env::current_exe().expect("a path");
        let Ok(Image::Elf(elf)) = Image::read(&ours) else { panic!("no ELF") };
        assert!(elf.interpreter.is_some());
        assert_eq!(elf.kind.bits, 64);
    }
}
