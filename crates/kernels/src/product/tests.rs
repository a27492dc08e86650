use proptest::prelude::*;

use super::*;

fn numbers(count: usize, step: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * step % 211) as f32 - 105.0) * 0.013).collect()
}

fn run(x: &[f32], m: usize, w: &Matrix, bias: Option<&[f32]>) -> Vec<f32> {
    let mut out = vec![0.0; m * w.rows()];
    packed(x, m, w.columns()).product(w, bias, Into::Store, &mut out, w.rows());
    out
}

fn packed(x: &[f32], m: usize, k: usize) -> Panels {
    let mut panels = Panels::default();
    panels.pack(x, k, m, k);
    panels
}

proptest! {
    #[test]
    fn sums_are_those_of_the_definition(m in 0usize..60, n in 0usize..30, k in 1usize..1700) {
        let (x, w) = (numbers(m * k, 37), numbers(n * k, 53));
        let bias = numbers(n, 17);
        let matrix = Matrix::from_f32(&w, n, k).unwrap();
        let mut out = numbers(m * n, 71);
        let before = out.clone();
        packed(&x, m, k).product(&matrix, Some(&bias), Into::Add, &mut out, n);
        for i in 0..m {
            for j in 0..n {
                let products = x[i * k..(i + 1) * k].iter().zip(&w[j * k..(j + 1) * k]);
                let sum: f64 = products.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                let exact = sum + f64::from(before[i * n + j]) + f64::from(bias[j]);
                prop_assert!((f64::from(out[i * n + j]) - exact).abs() < 1e-3, "{} {exact}", out[i * n + j]);
            }
        }
    }

    #[test]
    fn a_row_is_the_same_bits_in_any_company(m in 2usize..60, n in 1usize..30, k in 1usize..900) {
        let x = numbers(m * k, 41);
        let matrix = Matrix::from_f32(&numbers(n * k, 29), n, k).unwrap();
        let together = run(&x, m, &matrix, None);
        for i in 0..m {
            prop_assert_eq!(&run(&x[i * k..(i + 1) * k], 1, &matrix, None), &together[i * n..(i + 1) * n]);
        }
    }

    #[test]
    fn threads_that_share_the_outputs_change_no_bit(m in 0usize..30, n in 0usize..90, k in 1usize..900) {
        let (x, bias) = (numbers(m * k, 41), numbers(n, 17));
        let wide = Matrix::from_f32(&numbers(n * k, 29), n, k).unwrap();
        let threads = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        for matrix in [wide.to_bf16(), wide] {
            let (mut one, mut all) = (numbers(m * (n + 2), 71), numbers(m * (n + 2), 71));
            packed(&x, m, k).product(&matrix, Some(&bias), Into::Add, &mut one, n + 2);
            threads.install(|| packed(&x, m, k).product_shared(&matrix, Some(&bias), Into::Add, &mut all, n + 2));
            prop_assert_eq!(one, all);
        }
    }

    /// The lanes that this processor has, against plain Rust.
    #[test]
    fn every_processor_gives_the_same_bits(m in 1usize..60, outputs in 1usize..=STRIP, k in 1usize..RUN) {
        let (x, w) = (numbers(m * k, 43), numbers(outputs * k, 31));
        let panels = packed(&x, m, k);
        let weights = std::array::from_fn(|row| w[row.min(outputs - 1) * k..].as_ptr());
        let strip = Strip { weights, outputs, next: w.as_ptr(), next_stride: k };
        let (mut here, mut plain) = (vec![0.0f32; m * outputs], vec![0.0f32; m * outputs]);
        let to = |out: &mut [f32]| Target { to: out.as_mut_ptr(), stride: outputs, add: false };
        let mut lines = vec![Line::default(); panels.lines.len()];
        // SAFETY: the vectors are as long as the shapes say.
        unsafe {
            panels.strip(0, strip, to(&mut here));
            pack_on::<crate::lanes::Plain>(x.as_ptr(), k, m, k, lines.as_mut_ptr().cast());
            all_panels_on::<crate::lanes::Plain>(lines.as_ptr().cast(), m, k, 0, k, strip, to(&mut plain));
        }
        prop_assert_eq!(here, plain);
    }
}

#[test]
fn a_storage_is_what_it_reads_as() {
    let (n, k, m) = (7, 100, 5);
    let numbers_ = numbers(n * k, 53);
    let wide = Matrix::from_f32(&numbers_, n, k).unwrap();
    let x = numbers(m * k, 37);
    for narrow in [wide.to_bf16(), wide.to_int8().unwrap(), wide.to_f8_e4m3().unwrap()] {
        let mut widened = vec![0.0; n * k];
        for (row, out) in widened.chunks_mut(k).enumerate() {
            narrow.read_row(row, out);
        }
        let widened = Matrix::from_f32(&widened, n, k).unwrap();
        assert_eq!(run(&x, m, &narrow, None), run(&x, m, &widened, None), "{:?}", narrow.storage());
    }
}

/// A stride whose product with the rows wraps around reads and writes nothing.
#[test]
fn shapes_beyond_all_memory_are_refused() {
    let refused = |work: &dyn Fn()| std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).is_err();
    let w = Matrix::from_f32(&[1.0; 4], 2, 2).unwrap();
    let panels = packed(&[1.0; 34], 17, 2);
    assert!(refused(&|| panels.product(&w, None, Into::Store, &mut [0.0; 40], 1 << 60)));
    assert!(refused(&|| panels.product_shared(&w, None, Into::Store, &mut [0.0; 40], 1 << 60)));
    assert!(refused(&|| Panels::default().pack(&[1.0; 40], 1 << 60, 17, 2)));
    assert!(refused(&|| panels.product(&w, None, Into::Store, &mut [0.0; 40], 1)));
}
