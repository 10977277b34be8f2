//! JSON lines: one object a call, as a logger preloaded into the VMM writes them.
//!
//! Only the fields a replay needs are looked at; others (thread, duration) may be there or not. So may those that tell
//! processes and VMs apart (`pid`, `vm`), which recordings of one VMM with one VM do without. Numbers may be JSON numbers or
//! strings, decimal or `0x…`, because 64-bit addresses do not survive every JSON writer as numbers.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Visitor};

use super::{Answer, Bits, Call, GuestMemfd, Line, Record, Region, VmLimits, ioctl, number};

/// A number between the smallest i64 and the largest u64, however it was spelt.
#[derive(Clone, Copy, Debug)]
struct Number(i128);

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Spelling;
        impl Visitor<'_> for Spelling {
            type Value = Number;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a whole number, or a string with one (decimal or 0x…)")
            }

            fn visit_u64<E>(self, value: u64) -> Result<Number, E> {
                Ok(Number(value.into()))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Number, E> {
                Ok(Number(value.into()))
            }

            fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Number, E> {
                Err(E::custom(format!("number out of range: {value} is no whole number of at most 64 bits")))
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Number, E> {
                match number(text) {
                    Some(value) => Ok(Number(value.into())),
                    None => Err(E::custom(format!(
                        "number out of range or misspelt: \"{}\"",
                        super::excerpt(text)
                    ))),
                }
            }
        }
        deserializer.deserialize_any(Spelling)
    }
}

/// The fields of a line that matter; every other is skipped without being built.
#[derive(Deserialize)]
struct Fields<'a> {
    #[serde(borrow)]
    op: Cow<'a, str>,
    fd: Option<Number>,
    pid: Option<Number>,
    vm: Option<Number>,
    nr_memslots: Option<Number>,
    readonly_mem: Option<Number>,
    address_spaces: Option<Number>,
    t_ns: Option<Number>,
    ret: Option<Number>,
    errno: Option<Number>,
    cap: Option<Number>,
    slot: Option<Number>,
    flags: Option<Number>,
    gpa: Option<Number>,
    size: Option<Number>,
    hva: Option<Number>,
    guest_memfd: Option<Number>,
    guest_memfd_offset: Option<Number>,
    arg0: Option<Number>,
    npages: Option<Number>,
    first: Option<Number>,
    num: Option<Number>,
    set: Option<Number>,
    runs: Option<Vec<(Number, Number)>>,
}

/// Parses one line. The error is in words, without the line's number.
pub(super) fn parse(text: &str, line: u64) -> Result<Line, String> {
    let fields: Fields<'_> = serde_json::from_str(text).map_err(|error| explain(&error))?;
    let fd = fields.fd.map_or(Ok(-1), |fd| narrow("fd", fd))?;
    let start_ns = fields.t_ns.map(|t| narrow("t_ns", t)).transpose()?;
    let (name, call) = match fields.op.as_ref() {
        "create_vm" => (ioctl::name(0x01), Call::CreateVm(vm_limits(&fields)?)),
        "check_ext" => {
            let cap = fields.cap.map(|cap| narrow("cap", cap)).transpose()?;
            (ioctl::name(0x03), Call::CheckExtension(cap))
        }
        "enable_cap" => {
            let arg = fields.arg0.map_or(Ok(0), |arg| narrow("arg0", arg))?;
            let flags = fields.flags.map_or(Ok(0), |flags| narrow("flags", flags))?;
            (ioctl::name(0xa3), Call::EnableCap { cap: required("cap", fields.cap)?, flags, arg })
        }
        "create_vcpu" => (ioctl::name(0x41), Call::CreateVcpu),
        "coal_add" => (ioctl::name(0x67), Call::Other),
        "coal_del" => (ioctl::name(0x68), Call::Other),
        "get_dirty" => (ioctl::name(0x42), dirty_log(&fields, false)?),
        "clear_dirty" => (ioctl::name(0xc0), dirty_log(&fields, true)?),
        "create_guest_memfd" => (ioctl::name(0xd4), Call::CreateGuestMemfd),
        "reset_rings" => (ioctl::name(0xc7), Call::ResetRings),
        "set" => (ioctl::name(0x46), Call::SetRegion(region(&fields, false)?)),
        "set2" => (ioctl::name(0x49), Call::SetRegion(region(&fields, true)?)),
        op => match op.strip_prefix("req_").map(|hex| (hex, u8::from_str_radix(hex, 16))) {
            Some((_, Ok(number @ (0x46 | 0x49)))) => (ioctl::name(number), Call::SetRegionUnprinted),
            Some((_, Ok(number))) => (ioctl::name(number), Call::Other),
            Some((hex, Err(_))) => (Cow::Owned(format!("KVM request {}", super::excerpt(hex))), Call::Other),
            None => return Err(unknown_op(op)),
        },
    };
    let process = fields.pid.map(|pid| narrow("pid", pid)).transpose()?;
    let vm = fields.vm.map(|vm| narrow("vm", vm)).transpose()?;
    Ok(Line::Record(Record { line, start_ns, fd, process, vm, name, call, answer: answer(&fields)? }))
}

/// The kernel's limits, which a recorder may note where a VM is created.
fn vm_limits(fields: &Fields<'_>) -> Result<VmLimits, String> {
    let limits = [
        ("nr_memslots", ioctl::CAP_NR_MEMSLOTS, fields.nr_memslots),
        ("readonly_mem", ioctl::CAP_READONLY_MEM, fields.readonly_mem),
        ("address_spaces", ioctl::CAP_MULTI_ADDRESS_SPACE, fields.address_spaces),
        ("guest_memfd", ioctl::CAP_GUEST_MEMFD, fields.guest_memfd),
    ];
    let known = limits.iter().filter_map(|&(name, cap, value)| Some((name, cap, value?)));
    known.map(|(name, cap, value)| Ok((cap, narrow(name, value)?))).collect()
}

/// The most pages a slot can have.
const MAX_PAGES: u64 = (1 << 31) - 1;

/// A dirty-log call. Without its `runs` only the slot is known: a call that failed has none to show, and of one that
/// succeeded the recorder may not have been able to tell them.
fn dirty_log(fields: &Fields<'_>, clear: bool) -> Result<Call, String> {
    let slot = required("slot", fields.slot)?;
    let (field, pages) = if clear { ("num", fields.num) } else { ("npages", fields.npages) };
    let pages: u64 = pages.map_or(Ok(0), |pages| narrow(field, pages))?;
    if pages > MAX_PAGES {
        return Err(format!(
            "number out of range: `{field}` is {pages}, and a slot has at most {MAX_PAGES} pages"
        ));
    }
    if fields.runs.is_none() && matches!(answer(fields)?, Answer::Value(_)) {
        let first = fields.first.map_or(Ok(0), |first| narrow("first", first))?;
        return Ok(Call::DirtyLogUnprinted { slot: Some(slot), cleared: clear.then_some((first, pages)) });
    }
    let mut bits = Bits { pages, runs: Vec::new() };
    let mut set = 0;
    for &(first, count) in fields.runs.iter().flatten() {
        let (first, count): (u64, u64) = (narrow("runs", first)?, narrow("runs", count)?);
        let before = bits.runs.last().map_or(0, |&(first, count)| first + count);
        if first < before || count == 0 || first.checked_add(count).is_none_or(|end| end > pages) {
            return Err(format!(
                "run [{first}, {count}] is out of order or not within `{field}`, {pages} pages"
            ));
        }
        bits.runs.push((first, count));
        set += count;
    }
    match fields.set.map(|set| narrow::<u64>("set", set)).transpose()? {
        Some(said) if said != set => Err(format!("`set` says {said} bits, and `runs` has {set}")),
        _ if clear => {
            let first = fields.first.map_or(Ok(0), |first| narrow("first", first))?;
            Ok(Call::ClearDirtyLog { slot, first, mask: bits })
        }
        _ => Ok(Call::GetDirtyLog { slot, bits }),
    }
}

fn region(fields: &Fields<'_>, second: bool) -> Result<Region, String> {
    let second = match second {
        false => None,
        true => Some(GuestMemfd {
            file: fields.guest_memfd.map_or(Ok(0), |file| narrow("guest_memfd", file))?,
            offset: fields.guest_memfd_offset.map_or(Ok(0), |at| narrow("guest_memfd_offset", at))?,
        }),
    };
    Ok(Region {
        slot: required("slot", fields.slot)?,
        flags: required("flags", fields.flags)?,
        gpa: required("gpa", fields.gpa)?,
        size: required("size", fields.size)?,
        hva: required("hva", fields.hva)?,
        second,
    })
}

/// `ret` as the libc wrapper has it (-1 and `errno` beside it) or as the kernel has it (-errno).
fn answer(fields: &Fields<'_>) -> Result<Answer, String> {
    let ret: i64 = required("ret", fields.ret)?;
    if ret >= 0 {
        return Ok(Answer::Value(ret));
    }
    let errno: u64 = fields.errno.map_or(Ok(0), |errno| narrow("errno", errno))?;
    Ok(Answer::Errno(ioctl::errno(if errno == 0 { ret.unsigned_abs() } else { errno })))
}

fn required<T: TryFrom<i128>>(field: &str, value: Option<Number>) -> Result<T, String> {
    narrow(field, value.ok_or_else(|| format!("field `{field}` is missing"))?)
}

fn narrow<T: TryFrom<i128>>(field: &str, Number(value): Number) -> Result<T, String> {
    T::try_from(value).map_err(|_| {
        let bits = 8 * size_of::<T>();
        format!("number out of range: `{field}` is {value}, which does not fit its {bits} bits")
    })
}

fn unknown_op(op: &str) -> String {
    format!(
        "unknown op \"{}\" (known: create_vm, check_ext, enable_cap, create_vcpu, set, set2, get_dirty, \
         clear_dirty, reset_rings, create_guest_memfd, coal_add, coal_del, and req_NN with a request number in hexadecimal)",
        super::excerpt(op)
    )
}

/// serde_json's message, without its "at line 1", which is never the file's line.
fn explain(error: &serde_json::Error) -> String {
    let column = error.column();
    if error.is_eof() {
        return format!("the JSON object is cut short at column {column}");
    }
    let text = error.to_string();
    let text = text.split(" at line ").next().unwrap_or_default();
    match error.is_data() {
        true => text.to_owned(),
        false => format!("not a JSON object: {text} at column {column}"),
    }
}
