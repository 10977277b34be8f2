//! Where the guest's kernel comes from: Debian's package for clouds, unpacked below the target directory.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::run::say;
use crate::step::target_directory;

/// The package that depends on the newest kernel.
const PACKAGE: &str = "linux-image-cloud-amd64";

fn folder() -> PathBuf {
    target_directory().join("linux-kernel")
}

/// The kernel image, if it has been downloaded.
pub(crate) fn find() -> Option<PathBuf> {
    let images = fs::read_dir(folder().join("boot")).ok()?;
    let images = images.filter_map(|entry| Some(entry.ok()?.path()));
    let is_image =
        |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-"));
    images.filter(is_image).max()
}

/// Downloads the package and unpacks it. Nothing is installed.
pub(crate) fn download() -> Result<PathBuf> {
    let folder = folder();
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let depends = output(Command::new("apt-cache").args(["depends", PACKAGE]))?;
    let package = depends.lines().find_map(|line| line.trim().strip_prefix("Depends: linux-image-"));
    let package = format!("linux-image-{}", package.with_context(|| format!("apt knows no {PACKAGE}"))?);
    say(&format!("downloading {package}"));
    output(Command::new("apt-get").args(["download", "--quiet", &package]).current_dir(&folder))?;
    let files = fs::read_dir(&folder)?.filter_map(|entry| Some(entry.ok()?.path()));
    let file = files.filter(|path| path.extension().is_some_and(|extension| extension == "deb")).max();
    let file = file.context("apt-get downloaded nothing")?;
    output(Command::new("dpkg-deb").arg("-x").args([Path::new(&file), &folder]))?;
    fs::remove_file(&file).with_context(|| format!("cannot remove {}", file.display()))?;
    // Modules and documentation are not needed.
    for part in ["lib", "usr"] {
        let _ = fs::remove_dir_all(folder.join(part));
    }
    find().with_context(|| format!("{package} has no kernel image"))
}

fn output(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot start {program}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} failed: {}", said.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
