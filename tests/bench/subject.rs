//! What is measured.

use std::fmt;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// This agent.
    Ours,
    /// Another agent that reads the same `agent.toml`.
    Peer,
    /// The minimal relay of [`crate::floor`].
    Floor,
    /// No agent: [`crate::direct`].
    Direct,
    /// This agent, over TLS.
    Wss,
}

impl Subject {
    pub const ALL: [Self; 5] = [Self::Ours, Self::Peer, Self::Floor, Self::Direct, Self::Wss];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::Peer => "peer",
            Self::Floor => "floor",
            Self::Direct => "direct",
            Self::Wss => "wss",
        }
    }

    pub fn is_agent(self) -> bool {
        matches!(self, Self::Ours | Self::Peer | Self::Wss)
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
