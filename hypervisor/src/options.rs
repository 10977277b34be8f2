//! The hypervisor's command line: words `name=value`, as `cargo xtask linux` writes them after QEMU's `-append`.

/// What is run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Scenario {
    Trivial,
    Boot,
    Dirty,
    Hotplug,
    Storm,
    Shootdown,
    Torture,
}

/// See the [module documentation](self).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Options {
    pub(crate) scenario: Scenario,
    /// The guest's memory in bytes.
    pub(crate) memory: u64,
    /// Whether there may be pages of 2 MiB.
    pub(crate) large_pages: bool,
    /// Whether the processor's dirty bits are used, instead of write protection.
    pub(crate) dirty_bits: bool,
    /// Whether the guest runs on shadow tables, without nested paging.
    pub(crate) shadow: bool,
    /// How many shadow pages there may be.
    pub(crate) shadow_pages: usize,
    /// Up to which level the guest's tables may be unsync.
    pub(crate) unsync: u8,
    /// How many processors Linux has.
    pub(crate) processors: usize,
    /// Whether processors inside the guest are brought out to flush. Not, to show what that does.
    pub(crate) has_shootdown: bool,
    /// How many timer interrupts lie between two rounds of a scenario.
    pub(crate) round: u64,
}

impl Options {
    /// Reads the words.
    ///
    /// # Errors
    /// The word that makes no sense.
    pub(crate) fn parse(text: &str) -> Result<Self, &str> {
        let mut options = Self {
            scenario: Scenario::Trivial,
            memory: 512 << 20,
            large_pages: true,
            dirty_bits: false,
            shadow: false,
            shadow_pages: 1 << 13,
            unsync: 5,
            processors: 1,
            has_shootdown: true,
            round: 25,
        };
        for word in text.split_ascii_whitespace() {
            // QEMU may name the kernel in front.
            let Some((name, value)) = word.split_once('=') else { continue };
            match (name, value) {
                ("scenario", "trivial") => options.scenario = Scenario::Trivial,
                ("scenario", "boot") => options.scenario = Scenario::Boot,
                ("scenario", "dirty") => options.scenario = Scenario::Dirty,
                ("scenario", "hotplug") => options.scenario = Scenario::Hotplug,
                ("scenario", "storm") => options.scenario = Scenario::Storm,
                ("scenario", "shootdown") => options.scenario = Scenario::Shootdown,
                ("scenario", "torture") => options.scenario = Scenario::Torture,
                ("paging", "nested") => options.shadow = false,
                ("paging", "shadow") => options.shadow = true,
                ("shadow-pages", _) => options.shadow_pages = value.parse().map_err(|_| word)?,
                ("unsync", "1" | "2" | "3" | "4" | "5") => options.unsync = value.as_bytes()[0] - b'0',
                ("memory", _) => options.memory = value.parse::<u64>().map_err(|_| word)? << 20,
                ("pages", "4k") => options.large_pages = false,
                ("pages", "2m") => options.large_pages = true,
                ("rearm", "protect") => options.dirty_bits = false,
                ("rearm", "bits") => options.dirty_bits = true,
                ("processors", _) => options.processors = processors(value).ok_or(word)?,
                ("shootdown", "on") => options.has_shootdown = true,
                ("shootdown", "off") => options.has_shootdown = false,
                ("round", _) => options.round = value.parse().map_err(|_| word)?,
                _ => return Err(word),
            }
        }
        Ok(options)
    }
}

fn processors(number: &str) -> Option<usize> {
    number.parse().ok().filter(|number| (1..=crate::processors::MAX).contains(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_read_and_nonsense_is_named() {
        let options = Options::parse("kernel scenario=dirty memory=384 pages=4k rearm=bits").unwrap();
        assert_eq!((options.scenario, options.memory), (Scenario::Dirty, 384 << 20));
        assert!(!options.large_pages && options.dirty_bits);
        let options = Options::parse("processors=4 shootdown=off").unwrap();
        assert_eq!((options.processors, options.has_shootdown), (4, false));
        assert_eq!(Options::parse("processors=5"), Err("processors=5"));
        assert_eq!(Options::parse("pages=8k"), Err("pages=8k"));
        assert_eq!(Options::parse("memory=much"), Err("memory=much"));
    }
}
