//! The few colours of the terminal output. They are stripped where the output is no terminal or `NO_COLOR` is
//! set, so nothing may be said by colour alone.

use anstyle::{AnsiColor, Color, Style};

use crate::history::Kind;

pub(crate) const BOLD: Style = Style::new().bold();
pub(crate) const FAINT: Style = Style::new().dimmed();
pub(crate) const GOOD: Style = colour(AnsiColor::Green).bold();
pub(crate) const BAD: Style = colour(AnsiColor::Red).bold();
pub(crate) const WARN: Style = colour(AnsiColor::Yellow).bold();

const fn colour(colour: AnsiColor) -> Style {
    Style::new().fg_color(Some(Color::Ansi(colour)))
}

/// The colour of a kind of slot.
pub(crate) const fn kind(kind: Kind) -> Style {
    colour(match kind {
        Kind::Ram => AnsiColor::Blue,
        Kind::RamLogged => AnsiColor::Yellow,
        Kind::Rom => AnsiColor::Green,
        Kind::RomLogged => AnsiColor::Magenta,
        Kind::GuestMemfd => AnsiColor::Cyan,
    })
}

/// `text` in `style`.
pub(crate) fn paint(style: Style, text: impl std::fmt::Display) -> String {
    format!("{style}{text}{style:#}")
}
