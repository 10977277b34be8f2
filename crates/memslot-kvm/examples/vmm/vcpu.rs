//! A vCPU on a thread of its own, which can be made to stand still.

use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_ioctls::{VcpuExit, VcpuFd};
use memslot_kvm::Vcpus;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

/// What the VMM does with accesses to what is not memory.
pub trait Mmio: Send {
    fn read(&mut self, gpa: u64, data: &mut [u8]);
    fn write(&mut self, gpa: u64, data: &[u8]);
}

#[derive(Default)]
struct State {
    wanted: bool,
    standing: bool,
    ended: bool,
}

/// Where the vCPU's thread waits while it is paused.
#[derive(Default)]
struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

impl Gate {
    /// Waits as long as a pause is wanted.
    fn pass(&self) {
        let mut state = self.state.lock().unwrap();
        while state.wanted {
            state.standing = true;
            self.changed.notify_all();
            state = self.changed.wait(state).unwrap();
        }
        state.standing = false;
    }
}

/// A running vCPU.
pub struct Runner {
    gate: Arc<Gate>,
    thread: Arc<JoinHandle<()>>,
    result: Arc<Mutex<Result<(), String>>>,
}

extern "C" fn interrupt(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // That it comes is enough: KVM_RUN returns EINTR.
}

impl Runner {
    /// Starts the vCPU; it runs until it halts.
    pub fn start(mut vcpu: VcpuFd, mut mmio: impl Mmio + 'static) -> Self {
        register_signal_handler(SIGRTMIN(), interrupt).unwrap();
        let (gate, result) = (Arc::new(Gate::default()), Arc::new(Mutex::new(Ok(()))));
        let (gate_of_thread, result_of_thread) = (Arc::clone(&gate), Arc::clone(&result));
        let thread = std::thread::spawn(move || {
            let gate = gate_of_thread;
            loop {
                gate.pass();
                match vcpu.run() {
                    Ok(VcpuExit::MmioRead(gpa, data)) => mmio.read(gpa, data),
                    Ok(VcpuExit::MmioWrite(gpa, data)) => mmio.write(gpa, data),
                    Ok(VcpuExit::Hlt) => break,
                    Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => {}
                    other => {
                        *result_of_thread.lock().unwrap() = Err(format!("the guest stopped: {other:?}"));
                        break;
                    }
                }
            }
            gate.state.lock().unwrap().ended = true;
            gate.changed.notify_all();
        });
        Self { gate, thread: Arc::new(thread), result }
    }

    /// What can pause this vCPU.
    pub fn pauser(&self) -> Pauser {
        Pauser { gate: Arc::clone(&self.gate), thread: Arc::clone(&self.thread), pauses: Arc::default() }
    }

    /// Waits for the end.
    pub fn join(self) -> Result<(), String> {
        let mut state = self.gate.state.lock().unwrap();
        while !state.ended {
            state = self.gate.changed.wait(state).unwrap();
        }
        drop(state);
        self.result.lock().unwrap().clone()
    }
}

/// Pauses the vCPU for changes of its memory, and counts how often.
#[derive(Clone)]
pub struct Pauser {
    gate: Arc<Gate>,
    thread: Arc<JoinHandle<()>>,
    pub pauses: Arc<Mutex<u32>>,
}

impl Vcpus for Pauser {
    fn while_paused(&mut self, work: &mut dyn FnMut()) {
        let mut state = self.gate.state.lock().unwrap();
        state.wanted = true;
        while !state.standing && !state.ended {
            // A signal that comes just before KVM_RUN is lost; so it is sent until it has been noticed.
            let _ = self.thread.kill(SIGRTMIN());
            state = self.gate.changed.wait_timeout(state, Duration::from_millis(1)).unwrap().0;
        }
        *self.pauses.lock().unwrap() += 1;
        work();
        state.wanted = false;
        self.gate.changed.notify_all();
    }
}
