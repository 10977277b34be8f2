//! The calls that are recorded, and what of each goes into its line.

use std::ffi::{c_int, c_void};

use crate::arguments::{Answer, Argument, UserBitmap};
use crate::bitmap::{Runs, Size};
use crate::control::Control;
use crate::line::Line;
use crate::mapping::Mapping;
use crate::vms::{self, Found, Quiet, Vm};
use crate::{output, threads};

/// Lines up to this length are written on the stack, which may be a small one.
const SHORT: usize = 768;
/// A line longer than this is no line that can be read again: such a bitmap is left out. It takes a slot of some hundred
/// GiB whose pages are dirty here and there.
const LONGEST: usize = 200 << 20;

/// A request that is recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    CreateVm,
    CheckExtension,
    CreateVcpu,
    GetDirtyLog,
    SetRegion,
    SetRegion2,
    EnableCap,
    ClearDirtyLog,
    ResetRings,
    CreateGuestMemfd,
}

impl Request {
    /// By its number, which also holds the direction and the argument's size; the kernel compares all of it.
    pub(crate) fn of(request: u32) -> Option<Self> {
        Some(match request {
            0x0000_ae01 => Request::CreateVm,
            0x0000_ae03 => Request::CheckExtension,
            0x0000_ae41 => Request::CreateVcpu,
            0x4010_ae42 => Request::GetDirtyLog,
            0x4020_ae46 => Request::SetRegion,
            0x40a0_ae49 => Request::SetRegion2,
            0x4068_aea3 => Request::EnableCap,
            0xc018_aec0 => Request::ClearDirtyLog,
            0x0000_aec7 => Request::ResetRings,
            0xc040_aed4 => Request::CreateGuestMemfd,
            _ => return None,
        })
    }

    /// How a trace names a call whose argument could not be read.
    fn unread(self) -> &'static str {
        match self {
            Request::CreateVm => "create_vm",
            Request::CheckExtension => "check_ext",
            Request::CreateVcpu => "create_vcpu",
            Request::ResetRings => "reset_rings",
            Request::GetDirtyLog => "req_42",
            Request::SetRegion => "req_46",
            Request::SetRegion2 => "req_49",
            Request::EnableCap => "req_a3",
            Request::ClearDirtyLog => "req_c0",
            Request::CreateGuestMemfd => "req_d4",
        }
    }

    /// Whether the request is one of a vCPU as well, so that what is not surely a VM is not looked at.
    fn is_also_of_vcpus(self) -> bool {
        self == Request::EnableCap
    }
}

/// A call that has returned.
struct Call<'a> {
    control: &'a Control,
    request: Request,
    fd: c_int,
    vm: Option<&'static Vm>,
    pointer: *const c_void,
    answer: Answer,
    began: u64,
    took: u64,
}

/// Makes the call and records it. `errno` is as the call left it.
pub(crate) fn record(
    control: &Control,
    fd: c_int,
    request: Request,
    argument: *mut c_void,
    forward: impl FnOnce() -> c_int,
) -> c_int {
    let errno = threads::errno();
    let vm = match request {
        Request::CreateVm => None,
        Request::CheckExtension => vms::known(fd),
        _ => match vms::find(control, fd) {
            Found::Vm(vm) => Some(vm),
            Found::Perhaps if !request.is_also_of_vcpus() => None,
            Found::Perhaps | Found::Other => {
                threads::set_errno(errno);
                return forward();
            }
        },
    };
    let sets = matches!(request, Request::SetRegion | Request::SetRegion2);
    let quiet = vm.and_then(Vm::quiet);
    if let Some(vm) = vm.filter(|_| sets) {
        vm.begin_set();
    }
    threads::set_errno(errno);
    let began = threads::now();
    let ret = forward();
    let took = threads::now().saturating_sub(began);
    let errno = threads::errno();
    let answer = Answer { ret, errno: if ret < 0 { errno } else { 0 } };
    let call = Call { control, request, fd, vm, pointer: argument, answer, began, took };
    call.write(quiet);
    threads::set_errno(errno);
    ret
}

impl Call<'_> {
    fn write(mut self, quiet: Option<Quiet>) {
        match self.request {
            Request::CreateVm => self.create_vm(),
            Request::CheckExtension => self.plain("check_ext", "cap"),
            Request::CreateVcpu => self.plain("create_vcpu", "id"),
            Request::ResetRings => self.short("reset_rings", |_| ()),
            Request::SetRegion => self.set_region(),
            Request::SetRegion2 => self.set_region2(),
            Request::EnableCap => self.enable_cap(),
            Request::CreateGuestMemfd => self.create_guest_memfd(),
            Request::GetDirtyLog => self.get_dirty_log(quiet),
            Request::ClearDirtyLog => self.clear_dirty_log(),
        }
    }

    /// The new VM, and with it what this kernel lets a VM have: a VMM need not ask, and a replay must know.
    fn create_vm(&mut self) {
        const LIMITS: [(&str, c_int); 4] =
            [("nr_memslots", 10), ("readonly_mem", 81), ("address_spaces", 118), ("guest_memfd", 234)];
        let mut limits = [None; LIMITS.len()];
        if self.answer.is_success() {
            self.vm = vms::created(self.control, self.answer.ret);
            for (limit, (_, capability)) in limits.iter_mut().zip(LIMITS) {
                let answer = crate::check_extension(self.answer.ret, capability);
                *limit = (answer >= 0).then_some(answer);
            }
        }
        let kind = self.number();
        self.short("create_vm", |line| {
            line.number("type", kind);
            for ((name, _), limit) in LIMITS.iter().zip(limits) {
                if let Some(limit) = limit {
                    line.number(name, limit);
                }
            }
        });
    }

    /// A call whose argument is a number.
    fn plain(&self, op: &str, name: &str) {
        let number = self.number();
        self.short(op, |line| line.number(name, number));
    }

    fn set_region(&self) {
        let argument = Argument::<32>::copy(self.pointer, self.answer);
        self.end_set(argument.as_ref().map(|region| (region.u32(0), region.u64(16))));
        let Some(region) = argument else { return self.unread() };
        self.short("set", |line| members_of_region(line, &region));
    }

    fn set_region2(&self) {
        let argument = Argument::<44>::copy(self.pointer, self.answer);
        self.end_set(argument.as_ref().map(|region| (region.u32(0), region.u64(16))));
        let Some(region) = argument else { return self.unread() };
        self.short("set2", |line| {
            members_of_region(line, &region);
            line.number("guest_memfd", region.u32(40));
            line.hexadecimal("guest_memfd_offset", region.u64(32));
        });
    }

    /// Takes note of a slot's size, in bytes.
    fn end_set(&self, slot: Option<(u32, u64)>) {
        let Some(vm) = self.vm else { return };
        // SAFETY: asks for a constant.
        let page = u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096).max(1);
        vm.end_set(slot.filter(|_| self.answer.is_success()).map(|(slot, bytes)| (slot, bytes / page)));
    }

    fn enable_cap(&self) {
        let Some(cap) = Argument::<16>::copy(self.pointer, self.answer) else { return self.unread() };
        self.short("enable_cap", |line| {
            line.number("cap", cap.u32(0));
            line.number("flags", cap.u32(4));
            line.hexadecimal("arg0", cap.u64(8));
        });
    }

    fn create_guest_memfd(&self) {
        let Some(file) = Argument::<16>::copy(self.pointer, self.answer) else { return self.unread() };
        self.short("create_guest_memfd", |line| {
            line.hexadecimal("size", file.u64(0));
            line.number("flags", file.u64(8));
        });
    }

    fn get_dirty_log(&self, quiet: Option<Quiet>) {
        let Some(log) = Argument::<16>::copy(self.pointer, self.answer) else { return self.unread() };
        let slot = log.u32(0);
        let pages = self.vm.filter(|_| self.answer.is_success()).and_then(|vm| vm.pages_since(quiet, slot));
        let Some(pages) = pages else {
            return self.short("get_dirty", |line| line.number("slot", slot));
        };
        // SAFETY: the kernel has written a bitmap of the whole slot; no change of the slot began or ended meanwhile.
        let bitmap = unsafe { UserBitmap::new(log.u64(8), pages) };
        self.with_bitmap("get_dirty", pages, Some(bitmap), |line| {
            line.number("slot", slot);
            line.number("npages", pages);
        });
    }

    fn clear_dirty_log(&self) {
        let Some(log) = Argument::<24>::copy(self.pointer, self.answer) else { return self.unread() };
        let pages = u64::from(log.u32(4));
        let bitmap = self.answer.is_success().then(|| {
            // SAFETY: the kernel has read the mask, in whole words.
            unsafe { UserBitmap::new(log.u64(16), pages) }
        });
        self.with_bitmap("clear_dirty", pages, bitmap, |line| {
            line.number("slot", log.u32(0));
            line.number("first", log.u64(8));
            line.number("num", log.u32(4));
        });
    }

    /// A line with a bitmap, as long as that makes it. Without one, or if it is too long, without `runs` and `set`.
    fn with_bitmap(&self, op: &str, pages: u64, bitmap: Option<UserBitmap>, members: impl Fn(&mut Line<'_>)) {
        let Some(bitmap) = bitmap else { return self.short(op, members) };
        let runs = || Runs::new(pages, |nth| bitmap.word(nth));
        let size = Size::of(runs());
        let members_and_runs = |line: &mut Line<'_>| {
            members(line);
            line.number("set", size.set);
            line.pairs("runs", runs());
        };
        // The rest of such a line is shorter than half of what the stack has room for.
        if size.characters <= SHORT / 2 {
            return self.short(op, members_and_runs);
        }
        let written = Some(size.characters + SHORT / 2)
            .filter(|bytes| *bytes <= LONGEST)
            .and_then(Mapping::new)
            .is_some_and(|mut pages| self.append(pages.bytes_mut(), op, &members_and_runs));
        if !written {
            self.short(op, members);
        }
    }

    /// A call of which the argument is not known.
    fn unread(&self) {
        self.short(self.request.unread(), |_| ());
    }

    /// A line that fits on the stack.
    fn short(&self, op: &str, members: impl Fn(&mut Line<'_>)) {
        self.append(&mut [0; SHORT], op, &members);
    }

    /// Writes a line; false, and nothing, if it does not fit into `bytes`.
    fn append(&self, bytes: &mut [u8], op: &str, members: &impl Fn(&mut Line<'_>)) -> bool {
        let (process, thread) = threads::ids();
        let mut line = Line::new(bytes);
        line.number("t_ns", self.control.since_start(self.began));
        line.number("dur_ns", self.took);
        line.number("pid", process);
        line.number("tid", thread);
        if let Some(vm) = self.vm {
            line.number("vm", vm.number());
        }
        line.number("fd", self.fd);
        line.word("op", op);
        members(&mut line);
        line.number("ret", self.answer.ret);
        line.number("errno", self.answer.errno);
        line.finish().map(|line| output::append(self.control, line)).is_some()
    }

    /// The argument where it is a number.
    fn number(&self) -> u64 {
        u64::try_from(self.pointer.addr()).unwrap_or(u64::MAX)
    }
}

fn members_of_region<const BYTES: usize>(line: &mut Line<'_>, region: &Argument<BYTES>) {
    line.number("slot", region.u32(0));
    line.number("flags", region.u32(4));
    line.hexadecimal("gpa", region.u64(8));
    line.hexadecimal("size", region.u64(16));
    line.hexadecimal("hva", region.u64(24));
}
