//! strace's text: `[PID] [TIME] ioctl(FD, KVM_…, …) = RESULT [<DURATION>]`.
//!
//! What surrounds the call depends on strace's options (`-f`, `-t`, `-tt`, `-ttt`, `-T`, `-y`), so each part is
//! optional. With several threads strace splits a call that others interrupt into `… <unfinished ...>` and
//! `<... ioctl resumed>…`; [`Joiner`] keeps the first half by thread and gives the whole at the line of the
//! second.
//!
//! A line of another shape is not an error by itself, since a VMM's own messages often stand between strace's.
//! A KVM ioctl that cannot be read to its end is one.

use std::borrow::Cow;
use std::collections::HashMap;

use super::{Answer, Call, GuestMemfd, Line, Record, Region, excerpt, ioctl, number};

const UNFINISHED: &str = "<unfinished ...>";

/// A call's first half.
struct Half {
    start_ns: Option<u64>,
    text: String,
}

/// Parses lines, and joins the halves of calls that strace split.
#[derive(Default)]
pub(super) struct Joiner {
    halves: HashMap<Option<u64>, Half>,
}

impl Joiner {
    /// KVM calls whose second half has not come.
    pub(super) fn waiting(&self) -> u64 {
        u64::try_from(self.halves.len()).unwrap_or(u64::MAX)
    }

    /// Parses one line. The error is in words, without the line's number.
    pub(super) fn parse(&mut self, text: &str, line: u64) -> Result<Line, String> {
        let Prefix { pid, start_ns, rest } = prefix(text);
        if rest.starts_with("+++ ") || rest.starts_with("--- ") || rest.starts_with("strace: ") {
            return Ok(Line::Event);
        }
        if let Some(resumed) = rest.strip_prefix("<... ") {
            let Some((_, tail)) = resumed.split_once("resumed>") else { return Ok(Line::Foreign) };
            let Some(half) = self.halves.remove(&pid) else { return Ok(Line::OtherCall) };
            return call(&(half.text + tail), half.start_ns, line);
        }
        let Some(name) = call_name(rest) else { return Ok(Line::Foreign) };
        if name != "ioctl" {
            return Ok(Line::OtherCall);
        }
        if let Some(first) = rest.strip_suffix(UNFINISHED) {
            if !first.contains("KVM_") && !first.to_ascii_lowercase().contains("ae") {
                return Ok(Line::OtherCall);
            }
            self.halves.insert(pid, Half { start_ns, text: first.trim_end().to_owned() });
            return Ok(Line::Pending);
        }
        call(rest, start_ns, line)
    }
}

struct Prefix<'a> {
    pid: Option<u64>,
    start_ns: Option<u64>,
    rest: &'a str,
}

/// Splits off `[pid 123]` or `123`, then a time.
fn prefix(text: &str) -> Prefix<'_> {
    let mut rest = text.trim_start();
    let mut pid = None;
    if let Some((inside, after)) = rest.strip_prefix("[pid").and_then(|rest| rest.split_once(']')) {
        pid = inside.trim().parse().ok();
        rest = after.trim_start();
    } else if let Some((first, after)) = rest.split_once(' ') {
        if first.bytes().all(|byte| byte.is_ascii_digit()) && !first.is_empty() {
            pid = first.parse().ok();
            rest = after.trim_start();
        }
    }
    let mut start_ns = None;
    if let Some((first, after)) = rest.split_once(' ') {
        if let Some(time) = time(first) {
            start_ns = Some(time);
            rest = after.trim_start();
        }
    }
    Prefix { pid, start_ns, rest }
}

/// `1795220544.854223` (seconds) or `HH:MM:SS[.ffffff]`, in nanoseconds.
fn time(text: &str) -> Option<u64> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let seconds = match whole.split(':').collect::<Vec<_>>()[..] {
        [seconds] if text.contains('.') => seconds.parse::<u64>().ok()?,
        [hours, minutes, seconds] => {
            let (hours, minutes): (u64, u64) = (hours.parse().ok()?, minutes.parse().ok()?);
            hours
                .checked_mul(3600)?
                .checked_add(minutes.checked_mul(60)?)?
                .checked_add(seconds.parse().ok()?)?
        }
        _ => return None,
    };
    if fraction.is_empty() || fraction.len() > 9 || !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let nanos: u64 = format!("{fraction:0<9}").parse().ok()?;
    seconds.checked_mul(1_000_000_000)?.checked_add(nanos)
}

/// `name` of `name(…`, if the line begins like a system call.
fn call_name(text: &str) -> Option<&str> {
    let (name, _) = text.split_once('(')?;
    let fits = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    fits.then_some(name)
}

/// A whole `ioctl(…) = …`.
fn call(text: &str, start_ns: Option<u64>, line: u64) -> Result<Line, String> {
    let inside = text.strip_prefix("ioctl(").ok_or_else(|| cut(text))?;
    let Some((arguments, after)) = arguments(inside) else {
        // strace cuts nothing but what it was killed over: say so only for calls that matter.
        return if is_kvm_text(inside) { Err(cut(text)) } else { Ok(Line::Foreign) };
    };
    let [fd, request, rest @ ..] = &arguments[..] else { return Err(cut(text)) };
    let Some(name) = request_name(request) else { return Ok(Line::OtherCall) };
    let Some(answer) = answer(after) else {
        return Err(format!("the call's result is missing or unreadable: `{}`", excerpt(after.trim())));
    };
    let fd = fd.split('<').next().and_then(number).and_then(|fd| i64::try_from(fd).ok());
    // An ioctl on a bad descriptor is printed with a negative one; no VM has it.
    let fd = fd.unwrap_or(-1);
    let call = match name.as_ref() {
        "KVM_CREATE_VM" => Call::CreateVm(Vec::new()),
        "KVM_CHECK_EXTENSION" => Call::CheckExtension(rest.first().and_then(|cap| ioctl::capability(cap))),
        "KVM_SET_USER_MEMORY_REGION" => set_region(rest, false)?,
        "KVM_SET_USER_MEMORY_REGION2" => set_region(rest, true)?,
        "KVM_GET_DIRTY_LOG" | "KVM_CLEAR_DIRTY_LOG" => Call::DirtyLogUnprinted { slot: None, cleared: None },
        "KVM_RESET_DIRTY_RINGS" => Call::ResetRings,
        "KVM_CREATE_VCPU" => Call::CreateVcpu,
        "KVM_CREATE_GUEST_MEMFD" => Call::CreateGuestMemfd,
        _ => Call::Other,
    };
    Ok(Line::Record(Record { line, start_ns, fd, process: None, vm: None, name, call, answer }))
}

fn cut(text: &str) -> String {
    format!("the ioctl is cut short: `{}`", excerpt(text))
}

fn is_kvm_text(text: &str) -> bool {
    text.contains("KVM") || text.contains("0xae") || !text.contains(',')
}

/// The top-level arguments up to the closing parenthesis, and what follows it.
fn arguments(text: &str) -> Option<(Vec<&str>, &str)> {
    let (mut depth, mut quoted, mut escaped, mut start) = (0_u32, false, false, 0);
    let mut found = Vec::new();
    for (at, byte) in text.bytes().enumerate() {
        if quoted {
            quoted = escaped || byte != b'"';
            escaped = !escaped && byte == b'\\';
            continue;
        }
        match byte {
            b'"' => quoted = true,
            b'(' | b'[' | b'{' => depth += 1,
            b')' if depth == 0 => {
                found.push(text[start..at].trim());
                return Some((found, &text[at + 1..]));
            }
            b')' | b']' | b'}' => depth = depth.checked_sub(1)?,
            b',' if depth == 0 => {
                found.push(text[start..at].trim());
                start = at + 1;
            }
            _ => {}
        }
    }
    None
}

/// The request's KVM name, or `None` if it is not one of KVM's.
fn request_name(text: &str) -> Option<Cow<'static, str>> {
    if let Some(inside) = text.strip_prefix("_IOC(").and_then(|rest| rest.strip_suffix(')')) {
        let parts: Vec<&str> = inside.split(',').collect();
        let [_, letter, request, _] = parts[..] else { return None };
        return (number(letter)? == ioctl::KVMIO)
            .then(|| number(request).and_then(|request| u8::try_from(request).ok()))
            .flatten()
            .map(ioctl::name);
    }
    // "A or B": strace knows two names for one number.
    if let Some(name) = text.split(" or ").map(str::trim).find(|name| name.starts_with("KVM_")) {
        return Some(ioctl::intern(name.split(' ').next().unwrap_or(name)));
    }
    let request = number(without_comment(text))?;
    ((request >> 8) & 0xff == ioctl::KVMIO).then(|| ioctl::name(request.to_le_bytes()[0]))
}

/// `= 0 <0.000012>`, `= -1 EINVAL (Invalid argument)`, `= ?`.
fn answer(text: &str) -> Option<Answer> {
    let mut words = text.trim_start().strip_prefix('=')?.split_whitespace();
    let value = words.next()?.split('<').next()?;
    if value == "?" {
        return Some(Answer::Unknown);
    }
    if value.starts_with('-') {
        value.parse::<i64>().ok()?;
        let name = words.next()?;
        let fits = name.starts_with('E') && name.bytes().all(|byte| byte.is_ascii_alphanumeric());
        return fits.then(|| match name {
            "EINVAL" => Answer::Errno(Cow::Borrowed("EINVAL")),
            "EEXIST" => Answer::Errno(Cow::Borrowed("EEXIST")),
            other => Answer::Errno(Cow::Owned(other.to_owned())),
        });
    }
    number(value).and_then(|value| i64::try_from(value).ok()).map(Answer::Value)
}

fn set_region(arguments: &[&str], second: bool) -> Result<Call, String> {
    let argument = arguments.first().ok_or("the memory region is missing")?;
    let Some(inside) = argument.strip_prefix('{') else { return Ok(Call::SetRegionUnprinted) };
    let inside = inside.strip_suffix('}').ok_or("the memory region is cut short")?;
    let field = |name: &str| -> Result<Option<&str>, String> {
        let mut fields = inside.split(',').map(str::trim);
        let found = fields.find_map(|field| field.strip_prefix(name)?.strip_prefix('='));
        match found {
            None if inside.contains("...") => Err(format!(
                "strace abbreviated the memory region, `{name}` is not shown: record with `strace -v`"
            )),
            found => Ok(found),
        }
    };
    let value = |name: &str| -> Result<u64, String> {
        let text = field(name)?.ok_or_else(|| format!("field `{name}` of the memory region is missing"))?;
        number(without_comment(text)).ok_or_else(|| out_of_range(name, text, 64))
    };
    let narrow = |name: &str, value: u64| -> Result<u32, String> {
        u32::try_from(value).map_err(|_| out_of_range(name, &value.to_string(), 32))
    };
    let flags = field("flags")?.ok_or("field `flags` of the memory region is missing")?;
    let memfd = match second {
        false => None,
        true => {
            let file = field("guest_memfd")?.unwrap_or("0").split('<').next().unwrap_or("0");
            // An unused descriptor may be printed as -1.
            let file = if file.starts_with('-') { u64::from(u32::MAX) } else { number(file).unwrap_or(0) };
            let offset = field("guest_memfd_offset")?.map_or(Ok(0), |text| {
                number(without_comment(text)).ok_or_else(|| out_of_range("guest_memfd_offset", text, 64))
            })?;
            Some(GuestMemfd { file: narrow("guest_memfd", file)?, offset })
        }
    };
    Ok(Call::SetRegion(Region {
        slot: narrow("slot", value("slot")?)?,
        flags: region_flags(flags)?,
        gpa: value("guest_phys_addr")?,
        size: value("memory_size")?,
        hva: value("userspace_addr")?,
        second: memfd,
    }))
}

/// Names joined by `|`, numbers among them.
fn region_flags(text: &str) -> Result<u32, String> {
    without_comment(text).split('|').try_fold(0, |flags, flag| {
        Ok(flags
            | match flag.trim() {
                "KVM_MEM_LOG_DIRTY_PAGES" => 1,
                "KVM_MEM_READONLY" => 2,
                "KVM_MEM_GUEST_MEMFD" => 4,
                other => match number(other) {
                    Some(bits) => u32::try_from(bits).map_err(|_| out_of_range("flags", other, 32))?,
                    None => return Err(format!("unknown memory-region flag `{}`", excerpt(other))),
                },
            })
    })
}

fn out_of_range(field: &str, text: &str, bits: u32) -> String {
    format!("number out of range: `{field}` is `{}`, which is no number of {bits} bits", excerpt(text))
}

/// Without strace's `/* … */`.
fn without_comment(text: &str) -> &str {
    text.split("/*").next().unwrap_or(text).trim()
}
