//! How freed memory is kept for what comes next.
//!
//! Training and scoring take and free the same large arrays again and again. The C library gives each back to the
//! system at once, and the next one is mapped, cleared and faulted in page by page: a fifth of a distillation
//! step on a CPU (docs/decisions/019-freed-memory.md).

/// Freed memory is kept, whatever thread freed it. To be called before anything starts a thread. With another C
/// library than glibc it does nothing.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    for (parameter, value) in [
        // One heap for all threads: those of others are cut into pieces of 64 MiB, and larger arrays mapped apart.
        (libc::M_ARENA_MAX, 1),
        (libc::M_MMAP_THRESHOLD, KEPT_BYTES),
        (libc::M_TRIM_THRESHOLD, i32::MAX),
    ] {
        // SAFETY: sets a number of the allocator's; any value is allowed, and a refused one changes nothing.
        unsafe { libc::mallopt(parameter, value) };
    }
}

/// Returns to the system what is kept: once a task is done and nobody knows when the next one comes.
pub fn return_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: takes nothing that is in use.
    unsafe {
        libc::malloc_trim(0)
    };
}

/// Larger arrays are mapped and returned each on its own: of weights and optimisers, they live long.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const KEPT_BYTES: i32 = 64 << 20;

#[cfg(all(test, target_os = "linux", target_env = "gnu"))]
mod tests {
    use super::*;

    /// Pages that this thread had to be given by the system, so far.
    fn faults() -> i64 {
        // SAFETY: zeros are a valid `rusage`, and the call writes nothing else.
        let usage = unsafe {
            let mut usage: libc::rusage = std::mem::zeroed();
            assert_eq!(libc::getrusage(libc::RUSAGE_THREAD, &mut usage), 0);
            usage
        };
        usage.ru_minflt
    }

    /// Faults of writing to an array of 40 MiB, which is larger than what glibc keeps of itself.
    fn faults_of_an_array() -> i64 {
        let before = faults();
        let mut array = vec![0u8; 40 << 20];
        array.iter_mut().step_by(1 << 10).for_each(|byte| *byte = 1);
        std::hint::black_box(&array);
        faults() - before
    }

    #[test]
    fn an_array_takes_the_pages_of_a_freed_one() {
        keep_freed_memory();
        faults_of_an_array();
        let kept = faults_of_an_array();
        assert!(kept < 100, "{kept} of 10,240 pages were mapped again");
    }
}
