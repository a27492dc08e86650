//! How much memory a call takes, so that a small file which takes much is a fault.
//!
//! libFuzzer's own `-malloc_limit_mb` needs a sanitizer's runtime, which stable Rust has not.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    backtrace::Backtrace,
    sync::atomic::{AtomicUsize, Ordering},
};

static LIVE: AtomicUsize = AtomicUsize::new(0);
static LIMIT: AtomicUsize = AtomicUsize::new(usize::MAX);

/// Counts what is allocated and hands everything on to the system's allocator.
pub struct Counted;

/// Aborts at the request that goes too far, and shows who made it.
fn took(bytes: usize) {
    let live = LIVE.fetch_add(bytes, Ordering::Relaxed).wrapping_add(bytes);
    let limit = LIMIT.load(Ordering::Relaxed);
    if live > limit {
        LIMIT.store(usize::MAX, Ordering::Relaxed);
        let stack = Backtrace::force_capture();
        eprintln!("{bytes} bytes of memory are asked for, which is {} too many\n{stack}", live - limit);
        std::process::abort();
    }
}

// SAFETY: hands everything on to the system's allocator and only notes the sizes.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        took(layout.size());
        // SAFETY: the caller's promise, handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise, handed on.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Both may live while the values are moved.
        took(size);
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise, handed on.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

/// Aborts if `run` takes more than `most` bytes at any moment. One thread may ask at a time.
pub fn within<T>(most: usize, run: impl FnOnce() -> T) -> T {
    LIMIT.store(LIVE.load(Ordering::Relaxed).saturating_add(most), Ordering::Relaxed);
    let done = run();
    LIMIT.store(usize::MAX, Ordering::Relaxed);
    done
}
