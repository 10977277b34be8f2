//! What comes of holding the engine's answer against the recorded one.

use crate::trace::VmKey;

/// One answer held against the recorded one.
pub(crate) enum Verdict {
    Agreed,
    /// The recorded answer depends on what the engine cannot know.
    Unjudged {
        why: &'static str,
    },
    /// The engine answers something else.
    Disagreed {
        came: String,
        why: String,
    },
}

/// The engine and the kernel answered differently.
#[derive(Clone, Debug, serde::Serialize)]
pub(crate) struct Disagreement {
    pub(crate) line: u64,
    pub(crate) fd: i64,
    #[serde(skip)]
    pub(crate) key: VmKey,
    pub(crate) call: String,
    pub(crate) recorded: String,
    pub(crate) came: String,
    pub(crate) why: String,
}

/// A recorded answer that depends on what the engine cannot know.
#[derive(Clone, Debug, serde::Serialize)]
pub(crate) struct Unjudged {
    pub(crate) line: u64,
    pub(crate) fd: i64,
    pub(crate) call: String,
    pub(crate) recorded: String,
    pub(crate) why: String,
}
