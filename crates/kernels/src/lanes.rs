//! Eight f32 lanes: AVX2 with fused multiply-add, or plain Rust that gives the same bits.

/// Operations on eight numbers at once. Every implementation rounds alike, so results do not depend on
/// the processor.
///
/// # Safety
/// Methods may only be called where the processor has the implementation's instructions, and pointers
/// must be good for as many numbers as are read or written. No alignment is asked for.
pub(crate) trait Lanes: Copy {
    type V: Copy;

    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(from: *const f32) -> Self::V;
    unsafe fn store(to: *mut f32, x: Self::V);
    /// `a * b + c`, rounded once.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// To the nearest whole number, ties to even.
    unsafe fn round(x: Self::V) -> Self::V;
    /// Two to the power of a whole number from -126 to 127.
    unsafe fn exp2_whole(n: Self::V) -> Self::V;
    /// A bit a lane, the first lane's the lowest: whether `a >= b`.
    unsafe fn at_least(a: Self::V, b: Self::V) -> u32;
    /// Sums of four vectors' lanes: `((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))` of each.
    unsafe fn sums(x: [Self::V; 4]) -> [f32; 4];
    /// Lane by lane: numbers `i` of the four vectors go side by side to `to + i * stride`, for all eight.
    unsafe fn store_quads(to: *mut f32, stride: usize, x: [Self::V; 4]);
    /// Asks for the cache line of an address, which may be any.
    unsafe fn prefetch(at: *const u8);

    /// The sum of the lanes, in the order of [`Lanes::sums`].
    #[inline(always)]
    unsafe fn sum(x: Self::V) -> f32 {
        unsafe { Self::sums([x; 4])[0] }
    }

    #[inline(always)]
    unsafe fn to_array(x: Self::V) -> [f32; 8] {
        let mut lanes = [0.0; 8];
        unsafe { Self::store(lanes.as_mut_ptr(), x) };
        lanes
    }

    /// The first `count` numbers, below eight; the other lanes hold `other`.
    #[inline(always)]
    unsafe fn load_part(from: *const f32, count: usize, other: f32) -> Self::V {
        let mut lanes = [other; 8];
        unsafe {
            std::ptr::copy_nonoverlapping(from.cast::<u8>(), lanes.as_mut_ptr().cast::<u8>(), count * 4);
            Self::load(lanes.as_ptr())
        }
    }

    /// e^x within two units in the last place, for x from -87.3 to 88; at the ends of that range beyond it.
    #[inline(always)]
    unsafe fn exp(x: Self::V) -> Self::V {
        // x = n ln 2 + r with |r| <= ln 2 / 2, and a polynomial of degree 6 for e^r (Cephes, expf).
        unsafe {
            // In this order a not-a-number passes.
            let x = Self::min(Self::splat(88.0), Self::max(Self::splat(-87.3), x));
            let n = Self::round(Self::mul(x, Self::splat(std::f32::consts::LOG2_E)));
            let r = Self::fma(n, Self::splat(-0.693_359_4), x);
            let r = Self::fma(n, Self::splat(2.121_944_4e-4), r);
            let mut p = Self::splat(1.987_569_2e-4);
            for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
                p = Self::fma(p, r, Self::splat(c));
            }
            let p = Self::fma(p, Self::mul(r, r), Self::add(r, Self::splat(1.0)));
            Self::mul(p, Self::exp2_whole(n))
        }
    }
}

/// Plain Rust.
#[derive(Clone, Copy)]
pub(crate) struct Plain;

macro_rules! lanewise {
    ($($name:ident($($x:ident),+) = $body:expr;)*) => {
        $(#[inline(always)]
        unsafe fn $name($($x: [f32; 8]),+) -> [f32; 8] {
            std::array::from_fn(|lane| { $(let $x = $x[lane];)+ $body })
        })*
    };
}

impl Lanes for Plain {
    type V = [f32; 8];

    lanewise! {
        fma(a, b, c) = a.mul_add(b, c);
        add(a, b) = a + b;
        sub(a, b) = a - b;
        mul(a, b) = a * b;
        div(a, b) = a / b;
        // As the instructions have it: the second where either is no number.
        max(a, b) = if a > b { a } else { b };
        min(a, b) = if a < b { a } else { b };
        round(x) = x.round_ties_even();
        exp2_whole(n) = f32::from_bits(((n as i32 + 127) as u32) << 23);
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> [f32; 8] {
        [x; 8]
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> [f32; 8] {
        unsafe { from.cast::<[f32; 8]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, x: [f32; 8]) {
        unsafe { to.cast::<[f32; 8]>().write_unaligned(x) }
    }

    #[inline(always)]
    unsafe fn at_least(a: [f32; 8], b: [f32; 8]) -> u32 {
        (0..8).map(|lane| u32::from(a[lane] >= b[lane]) << lane).sum()
    }

    #[inline(always)]
    unsafe fn sums(x: [[f32; 8]; 4]) -> [f32; 4] {
        x.map(|x| ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7])))
    }

    #[inline(always)]
    unsafe fn store_quads(to: *mut f32, stride: usize, x: [[f32; 8]; 4]) {
        for lane in 0..8 {
            let quad = x.map(|numbers| numbers[lane]);
            unsafe { to.add(lane * stride).cast::<[f32; 4]>().write_unaligned(quad) };
        }
    }

    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
}

/// AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx2;

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use super::{Avx2, Lanes};

    impl Lanes for Avx2 {
        type V = __m256;

        #[inline(always)]
        unsafe fn splat(x: f32) -> __m256 {
            unsafe { _mm256_set1_ps(x) }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> __m256 {
            unsafe { _mm256_loadu_ps(from) }
        }

        #[inline(always)]
        unsafe fn store(to: *mut f32, x: __m256) {
            unsafe { _mm256_storeu_ps(to, x) }
        }

        #[inline(always)]
        unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
            unsafe { _mm256_fmadd_ps(a, b, c) }
        }

        #[inline(always)]
        unsafe fn add(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_add_ps(a, b) }
        }

        #[inline(always)]
        unsafe fn sub(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_sub_ps(a, b) }
        }

        #[inline(always)]
        unsafe fn mul(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_mul_ps(a, b) }
        }

        #[inline(always)]
        unsafe fn div(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_div_ps(a, b) }
        }

        #[inline(always)]
        unsafe fn max(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_max_ps(a, b) }
        }

        #[inline(always)]
        unsafe fn min(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_min_ps(a, b) }
        }

        #[inline(always)]
        unsafe fn round(x: __m256) -> __m256 {
            unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x) }
        }

        #[inline(always)]
        unsafe fn exp2_whole(n: __m256) -> __m256 {
            unsafe {
                let biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
            }
        }

        #[inline(always)]
        unsafe fn at_least(a: __m256, b: __m256) -> u32 {
            unsafe { _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GE_OQ>(a, b)) as u32 }
        }

        #[inline(always)]
        unsafe fn sums([a, b, c, d]: [__m256; 4]) -> [f32; 4] {
            unsafe {
                let quads = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
                let sums = _mm_add_ps(_mm256_castps256_ps128(quads), _mm256_extractf128_ps::<1>(quads));
                let mut out = [0.0; 4];
                _mm_storeu_ps(out.as_mut_ptr(), sums);
                out
            }
        }

        #[inline(always)]
        unsafe fn store_quads(to: *mut f32, stride: usize, [a, b, c, d]: [__m256; 4]) {
            unsafe {
                let (ab_low, ab_high) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
                let (cd_low, cd_high) = (_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
                // Each holds lane i's quad, and lane i + 4's above it.
                let quads = [
                    _mm256_shuffle_ps::<0x44>(ab_low, cd_low),
                    _mm256_shuffle_ps::<0xee>(ab_low, cd_low),
                    _mm256_shuffle_ps::<0x44>(ab_high, cd_high),
                    _mm256_shuffle_ps::<0xee>(ab_high, cd_high),
                ];
                for (lane, both) in quads.into_iter().enumerate() {
                    _mm_storeu_ps(to.add(lane * stride), _mm256_castps256_ps128(both));
                    _mm_storeu_ps(to.add((lane + 4) * stride), _mm256_extractf128_ps::<1>(both));
                }
            }
        }

        #[inline(always)]
        unsafe fn prefetch(at: *const u8) {
            unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
        }
    }
}

/// Whether this processor runs [`Avx2`].
#[inline]
pub(crate) fn avx2() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// Writes `pub(crate) fn name(args)` that runs `name::body::<L>(args)` with the lanes this processor has.
macro_rules! on_lanes {
    ($(#[$about:meta])* $visibility:vis unsafe fn $name:ident($($x:ident: $type:ty),* $(,)?) $(-> $out:ty)? = $body:ident) => {
        $(#[$about])*
        #[allow(clippy::too_many_arguments)]
        $visibility unsafe fn $name($($x: $type),*) $(-> $out)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                unsafe fn with_avx2($($x: $type),*) $(-> $out)? {
                    unsafe { $body::<$crate::lanes::Avx2>($($x),*) }
                }
                if $crate::lanes::avx2() {
                    return unsafe { with_avx2($($x),*) };
                }
            }
            unsafe { $body::<$crate::lanes::Plain>($($x),*) }
        }
    };
}
pub(crate) use on_lanes;
