//! The table of races names tests that there are.
#![cfg(not(loom))]

use std::fs;
use std::path::Path;

#[test]
fn the_table_of_races_names_tests_that_there_are() {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let table = fs::read_to_string(sources.join("races.md")).unwrap();
    let models: String = ["nested", "rmap", "shadow"]
        .iter()
        .flat_map(|module| fs::read_dir(sources.join(module)).unwrap())
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.to_string_lossy().contains("loom"))
        .map(|path| fs::read_to_string(path).unwrap())
        .collect();
    let words = table.split(|letter: char| !letter.is_alphanumeric() && letter != '_');
    let named: Vec<_> = words.filter(|word| word.starts_with("loom_")).collect();
    for name in &named {
        assert!(models.contains(&format!("fn {name}()")), "{name} is in the table, and nowhere else");
    }
    assert!(named.len() > 20);
    // Every row but that of the lock has one.
    for row in table.lines().filter(|line| line.starts_with("| D") && !line.starts_with("| D8 ")) {
        assert!(row.contains("`loom_"), "{row}");
    }
}
