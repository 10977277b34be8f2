//! A line of the trace: a JSON object, written into bytes that the caller provides.
//!
//! Names and operations are this crate's own, so nothing needs escaping. What does not fit makes the whole line void,
//! for half a line would make the trace unreadable.

/// An object under construction.
pub(crate) struct Line<'a> {
    bytes: &'a mut [u8],
    len: usize,
    overflown: bool,
}

impl<'a> Line<'a> {
    pub(crate) fn new(bytes: &'a mut [u8]) -> Self {
        Line { bytes, len: 0, overflown: false }
    }

    /// A member whose value is a decimal number.
    pub(crate) fn number(&mut self, name: &str, value: impl Into<i128>) {
        self.name(name);
        let value = value.into();
        if value < 0 {
            self.raw(b"-");
        }
        self.decimal(value.unsigned_abs().try_into().unwrap_or(u64::MAX));
    }

    /// A member whose value is a string with the number in hexadecimal: addresses survive every JSON reader so.
    pub(crate) fn hexadecimal(&mut self, name: &str, value: u64) {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        self.name(name);
        self.raw(b"\"0x");
        let digits = (64 - (value | 1).leading_zeros()).div_ceil(4);
        for digit in (0..digits).rev() {
            let nibble = usize::try_from(value >> (4 * digit) & 0xf).unwrap_or(0);
            self.raw(&[DIGITS[nibble]]);
        }
        self.raw(b"\"");
    }

    /// A member whose value is one of our own words.
    pub(crate) fn word(&mut self, name: &str, value: &str) {
        self.name(name);
        self.raw(b"\"");
        self.raw(value.as_bytes());
        self.raw(b"\"");
    }

    /// A member whose value is an array of pairs.
    pub(crate) fn pairs(&mut self, name: &str, pairs: impl Iterator<Item = (u64, u64)>) {
        self.name(name);
        self.raw(b"[");
        for (nth, (first, second)) in pairs.enumerate() {
            self.raw(if nth > 0 { b",[" } else { b"[" });
            self.decimal(first);
            self.raw(b",");
            self.decimal(second);
            self.raw(b"]");
        }
        self.raw(b"]");
    }

    /// The finished line, newline included; `None` if it did not fit.
    pub(crate) fn finish(mut self) -> Option<&'a [u8]> {
        self.raw(if self.len == 0 { b"{}\n" } else { b"}\n" });
        if self.overflown { None } else { self.bytes.get(..self.len) }
    }

    fn name(&mut self, name: &str) {
        self.raw(if self.len == 0 { b"{\"" } else { b",\"" });
        self.raw(name.as_bytes());
        self.raw(b"\":");
    }

    fn decimal(&mut self, mut value: u64) {
        let mut digits = [0; 20];
        let mut at = digits.len();
        loop {
            at -= 1;
            digits[at] = b'0' + u8::try_from(value % 10).unwrap_or(0);
            value /= 10;
            if value == 0 {
                break;
            }
        }
        self.raw(&digits[at..]);
    }

    fn raw(&mut self, text: &[u8]) {
        match self.bytes.get_mut(self.len..).and_then(|rest| rest.get_mut(..text.len())) {
            Some(room) => {
                room.copy_from_slice(text);
                self.len += text.len();
            }
            None => self.overflown = true,
        }
    }
}

/// How many digits a number has.
pub(crate) fn digits(value: u64) -> usize {
    usize::try_from(value.checked_ilog10().unwrap_or(0)).unwrap_or(0) + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(write: impl FnOnce(&mut Line<'_>)) -> String {
        let mut bytes = [0; 512];
        let mut line = Line::new(&mut bytes);
        write(&mut line);
        String::from_utf8(line.finish().expect("it fits").to_vec()).expect("UTF-8")
    }

    #[test]
    fn members_of_every_kind() {
        let line = written(|line| {
            line.word("op", "set");
            line.number("fd", 0);
            line.number("ret", -1);
            line.number("least", i64::MIN);
            line.number("t_ns", u64::MAX);
            line.hexadecimal("gpa", 0);
            line.hexadecimal("size", 0x10);
            line.hexadecimal("hva", u64::MAX);
            line.pairs("runs", [(0, 1), (70, 1_000)].into_iter());
            line.pairs("none", std::iter::empty());
        });
        assert_eq!(
            line,
            "{\"op\":\"set\",\"fd\":0,\"ret\":-1,\"least\":-9223372036854775808,\"t_ns\":18446744073709551615,\
             \"gpa\":\"0x0\",\"size\":\"0x10\",\"hva\":\"0xffffffffffffffff\",\"runs\":[[0,1],[70,1000]],\"none\":[]}\n"
        );
        assert_eq!(written(|_| ()), "{}\n");
    }

    #[test]
    fn a_line_is_whole_or_void() {
        let whole = written(|line| line.number("slot", 17));
        for room in 0..whole.len() {
            let mut bytes = vec![0; room];
            let mut line = Line::new(&mut bytes);
            line.number("slot", 17);
            assert_eq!(line.finish(), None, "{room}");
        }
        let mut bytes = vec![0; whole.len()];
        let mut line = Line::new(&mut bytes);
        line.number("slot", 17);
        assert_eq!(line.finish(), Some(whole.as_bytes()));
    }

    #[test]
    fn digits_are_those_written() {
        for value in [0, 9, 10, 99, 100, 999_999_999, u64::MAX] {
            assert_eq!(digits(value), value.to_string().len(), "{value}");
        }
    }
}
