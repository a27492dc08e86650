//! Tells when the disk that the processes write to is full: their own logs cannot.

use std::{path::PathBuf, time::Duration};

use tokio::sync::mpsc;

use super::Notice;

const EVERY: Duration = Duration::from_secs(3);
/// Less than this counts as full, bytes.
const FULL: u64 = 256 << 10;
/// More than this counts as room again.
const ROOM: u64 = 4 << 20;

/// Looks at the space around `folder`, for ever.
pub async fn watch(folder: PathBuf, notices: mpsc::Sender<Notice>) {
    let mut full = false;
    loop {
        let now = free_bytes(&folder);
        if !full && now.is_some_and(|free| free < FULL) {
            full = true;
            let _ = notices.try_send(Notice::DiskFull { folder: folder.clone() });
        } else if full && now.is_some_and(|free| free > ROOM) {
            full = false;
            let _ = notices.try_send(Notice::RoomAgain { folder: folder.clone() });
        }
        tokio::time::sleep(EVERY).await;
    }
}

fn free_bytes(folder: &std::path::Path) -> Option<u64> {
    let space = rustix::fs::statvfs(folder).ok()?;
    Some(space.f_bavail.saturating_mul(space.f_frsize))
}
