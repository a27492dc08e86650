//! States of jobs and tasks, and which may follow which.

macro_rules! named {
    ($(#[$meta:meta])* $name:ident { $($(#[$vmeta:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$vmeta])* $variant,)* }

        impl $name {
            pub const ALL: &[$name] = &[$($name::$variant,)*];

            /// As the database and the logs write it.
            pub fn as_str(self) -> &'static str {
                match self { $($name::$variant => $text,)* }
            }

            pub fn parse(text: &str) -> Option<Self> {
                match text { $($text => Some($name::$variant),)* _ => None }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

named! {
    JobState {
        Queued = "queued",
        Running = "running",
        /// Every gate passed, the candidate is promoted.
        Succeeded = "succeeded",
        /// All work is done and a gate failed; the candidate stays a candidate.
        Rejected = "rejected",
        Failed = "failed",
        Cancelled = "cancelled",
    }
}

impl JobState {
    pub fn is_final(self) -> bool {
        !matches!(self, Self::Queued | Self::Running)
    }
}

named! {
    /// `Waiting` (its inputs are not there yet) -> `Ready` (may be published to the bus) ->
    /// `Queued` (published) -> `Leased` -> `Done`; a lost lease goes back to `Ready`.
    TaskState {
        Waiting = "waiting",
        Ready = "ready",
        Queued = "queued",
        Leased = "leased",
        Done = "done",
        Failed = "failed",
        Cancelled = "cancelled",
    }
}

impl TaskState {
    pub fn is_final(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Cancelled)
    }
}

named! {
    TaskKind {
        Shard = "shard",
        Train = "train",
        /// Computes beside the train task of its job, for as long as that runs.
        Replica = "replica",
        Evaluate = "evaluate",
    }
}

named! {
    Split {
        Train = "train",
        HeldOut = "held_out",
    }
}
