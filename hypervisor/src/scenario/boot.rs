//! `boot`: Linux to user space; its first program fills most of RAM from several processes, checks every page, and turns the
//! machine off. The hypervisor only maps.

use super::Scenario;

/// See the [module documentation](self).
pub(crate) struct Boot;

impl Scenario for Boot {}
