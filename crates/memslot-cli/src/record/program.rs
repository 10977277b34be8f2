//! Which file the command is, and whether the dynamic loader will load the recording library into it.
//!
//! What a loader does in silence is found out here: a static program has no loader, a set-user-ID program makes it ignore
//! `LD_PRELOAD`, and one for another machine or libc makes it complain and go on without. A script is followed to its
//! interpreter; what the script starts in its turn is not known beforehand.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::Access;

use super::image::Image;
use super::library::Library;
use super::{Refusal, name};

/// The kernel follows no more scripts than this, one interpreted by the next.
const MOST_SCRIPTS: usize = 5;

/// The command, found.
#[derive(Debug)]
pub(super) struct Program {
    pub(super) path: PathBuf,
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
