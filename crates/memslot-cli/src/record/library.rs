//! Where the recording library is, and how the dynamic loader can be told.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use super::Refusal;
use super::image::{Image, Kind};

const NAME: &str = "libmemslot_preload.so";
const PRELOAD: &str = "LD_PRELOAD";

/// The recording library.
pub(super) struct Library {
    pub(super) path: PathBuf,
    pub(super) kind: Kind,
    /// Named by the user, who may know better than we do which libc it is for.
    pub(super) chosen: bool,
}

impl Library {
    /// The one that was named, or the one that was built or installed with this program.
    pub(super) fn find(named: Option<&Path>) -> Result<Self, Refusal> {
        let path = match named {
            Some(path) => path.to_owned(),
            None => beside_us()?,
        };
        let refuse = |what: &str| Refusal::recorder(format!("{}: {what}", path.display()));
        let path = fs::canonicalize(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => refuse("no such library"),
            _ => refuse(&error.to_string()),
        })?;
        match Image::read(&path) {
            Ok(Image::Elf(elf)) => Ok(Library { path, kind: elf.kind, chosen: named.is_some() }),
            Ok(_) => Err(refuse("is no library")),
            Err(error) => Err(refuse(&error)),
        }
    }

    /// The value of `LD_PRELOAD`: the library, then what is preloaded anyway.
    ///
    /// The loader splits the value at spaces and colons and expands dollar signs, and knows no way to quote them. A path
    /// with such characters is given another name, in `folder`.
    pub(super) fn preload(&self, folder: &Path) -> Result<OsString, Refusal> {
        let awkward = |path: &Path| path.as_os_str().as_bytes().iter().any(|byte| b" :$".contains(byte));
        let mut path = self.path.clone();
        if awkward(&path) {
            path = folder.join(NAME);
            if awkward(&path) {
                return Err(Refusal::recorder(format!(
                    "{}: LD_PRELOAD cannot name a path with spaces, colons or dollar signs; set TMPDIR to a folder without",
                    path.display()
                )));
            }
            std::os::unix::fs::symlink(&self.path, &path)
                .map_err(|error| Refusal::recorder(format!("{}: {error}", path.display())))?;
        }
        let mut value = path.into_os_string().into_vec();
        if let Some(theirs) = env::var_os(PRELOAD).filter(|theirs| !theirs.is_empty()) {
            value.push(b':');
            value.extend(theirs.into_vec());
        }
        Ok(OsString::from_vec(value))
    }
}

/// Next to this program, as cargo builds it, or where a package would install it.
fn beside_us() -> Result<PathBuf, Refusal> {
    let program = env::current_exe()
        .map_err(|error| Refusal::recorder(format!("cannot find out where this program is: {error}")))?;
    let folder = program.parent().unwrap_or(Path::new("/"));
    let places =
        [folder.join(NAME), folder.join("../lib/memslot").join(NAME), folder.join("../lib").join(NAME)];
    places.into_iter().find(|place| place.exists()).ok_or_else(|| {
        let release = if cfg!(debug_assertions) { "" } else { "--release " };
        Refusal::recorder(format!(
            "the recording library {NAME} is not next to this program, in {}\n\
             In memslot's sources, build it with `cargo build {release}-p memslot-preload`; or say where it is with --library",
            folder.display()
        ))
    })
}
