//! Which file the command is, and whether the dynamic loader will load the recording library into it.
//!
//! What a loader does in silence is found out here: a static program has no loader, a set-user-ID program makes it ignore
//! `LD_PRELOAD`, and one for another machine or libc makes it complain and go on without. A script is followed to its
//! interpreter; what the script starts in its turn is not known beforehand.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use object::elf::{FileHeader32, FileHeader64};
use object::read::ReadCache;
use object::read::elf::{FileHeader, ProgramHeader};
use object::{Endianness, FileKind};
use rustix::fs::Access;

use super::library::Library;
use super::{Refusal, name};

/// The kernel follows no more scripts than this, one interpreted by the next.
const MOST_SCRIPTS: usize = 5;

/// The command, found.
#[derive(Debug)]
pub(super) struct Program {
    pub(super) path: PathBuf,
}

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
    interpreter: Option<PathBuf>,
}

/// What an executable file is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Image {
    Elf(Elf),
    /// With the interpreter of its first line.
    Script(PathBuf),
    Other,
}

impl Program {
    /// Finds the command as a shell would.
    pub(super) fn find(command: &[OsString]) -> Result<Self, Refusal> {
        let name = command.first().map_or(OsStr::new(""), OsString::as_os_str);
        if name.as_bytes().contains(&b'/') {
            return Self::at(PathBuf::from(name));
        }
        let folders = env::var_os("PATH").unwrap_or_default();
        let places = env::split_paths(&folders).map(|folder| folder.join(name));
        let mut unfit = None;
        for place in places.filter(|place| !name.is_empty() && place.is_file()) {
            match Self::at(place) {
                Ok(program) => return Ok(program),
                Err(refusal) => _ = unfit.get_or_insert(refusal),
            }
        }
        Err(unfit.unwrap_or_else(|| Refusal {
            status: Refusal::NOT_FOUND,
            message: format!("{}: no such command", name.to_string_lossy()),
        }))
    }

    fn at(path: PathBuf) -> Result<Self, Refusal> {
        let refuse =
            |status, what: &str| Err(Refusal { status, message: format!("{}: {what}", path.display()) });
        match fs::metadata(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                refuse(Refusal::NOT_FOUND, "no such file")
            }
            Err(error) => refuse(Refusal::UNFIT, &error.to_string()),
            Ok(about) if !about.is_file() => refuse(Refusal::UNFIT, "is no program"),
            Ok(_) if rustix::fs::access(&path, Access::EXEC_OK).is_err() => {
                refuse(Refusal::UNFIT, "is not executable")
            }
            Ok(_) => Ok(Program { path }),
        }
    }

    /// Refuses a command that would run without being recorded. `strace` says how to record it instead.
    pub(super) fn check(&self, library: &Library, strace: &str) -> Result<(), Refusal> {
        let mut path = self.path.clone();
        for _ in 0..MOST_SCRIPTS {
            let refuse = |what: &str| {
                Err(Refusal {
                    status: Refusal::UNFIT,
                    message: format!(
                        "{}: {what}, so it cannot be recorded from inside\nstrace records it from outside, without dirty bitmaps:\n{strace}",
                        path.display()
                    ),
                })
            };
            match Image::read(&path) {
                Err(error) => return refuse(&error),
                Ok(Image::Other) => {
                    let message = format!("{}: is neither an ELF program nor a script", path.display());
                    return Err(Refusal { status: Refusal::UNFIT, message });
                }
                Ok(Image::Script(interpreter)) => path = interpreter,
                Ok(Image::Elf(elf)) => {
                    if elf.kind != library.kind {
                        return refuse("is a program for another machine than the recording library");
                    }
                    let Some(loader) = elf.interpreter else {
                        return refuse("is a static program, which loads no libraries");
                    };
                    let musl = loader.to_string_lossy().contains("musl");
                    if musl != cfg!(target_env = "musl") && !library.chosen {
                        let libc = if musl { "musl" } else { "glibc" };
                        return refuse(&format!(
                            "is linked against {libc}, and the recording library is not"
                        ));
                    }
                    if let Some(why) = privileges(&path) {
                        return refuse(&format!(
                            "{why}, and the loader ignores LD_PRELOAD for such programs"
                        ));
                    }
                    return Ok(());
                }
            }
        }
        let message = format!(
            "{}: scripts interpret one another more than {MOST_SCRIPTS} deep",
            name(&[self.path.clone().into()])
        );
        Err(Refusal { status: Refusal::UNFIT, message })
    }
}

/// What a program gains when it is started, if it does.
fn privileges(path: &Path) -> Option<&'static str> {
    const SET_USER: u32 = 0o4000;
    const SET_GROUP: u32 = 0o2000;
    let about = fs::metadata(path).ok()?;
    let mode = about.permissions().mode();
    if mode & SET_USER != 0 && about.uid() != rustix::process::getuid().as_raw() {
        return Some("runs as another user (set-user-ID)");
    }
    if mode & SET_GROUP != 0 && about.gid() != rustix::process::getgid().as_raw() {
        return Some("runs as another group (set-group-ID)");
    }
    let mut nothing: [u8; 0] = [];
    let capabilities =
        rustix::fs::getxattr(path, "security.capability", &mut nothing).is_ok_and(|size| size > 0);
    (capabilities && !rustix::process::geteuid().is_root()).then_some("has file capabilities")
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
