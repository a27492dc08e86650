//! Changes that get past the footer and the content's hash, so that what is changed is looked at.
//!
//! libFuzzer's own changes of single bytes are used too, inside a page or a value of the metadata; then
//! offsets and sizes are made to fit again.

use super::{
    file::{Chunk, File, Page, id},
    thrift::{I64, Value},
};

const INT32: i64 = 1;
const FLOAT: i64 = 4;
const BYTE_STREAM_SPLIT: i64 = 9;

/// Where checks of numbers have their edges.
const INTEGERS: [i64; 20] =
    [0, 1, -1, 2, 3, 4, 7, 8, 15, 63, 64, 127, 255, 256, 65_535, 1 << 20, 1 << 26, i32::MAX as i64, i64::MAX, i64::MIN];
const FLOATS: [f32; 16] = [
    0.0,
    -0.0,
    1.0,
    0.5,
    0.999,
    1.0005,
    1e-3,
    -1e-3,
    -1e-45,
    -100.0,
    -800.0,
    f32::MIN,
    f32::MAX,
    f32::NAN,
    f32::INFINITY,
    f32::NEG_INFINITY,
];

/// Changes bytes as libFuzzer does: `(data, size, most)` to the new size.
pub type Bytewise<'a> = &'a dyn Fn(&mut [u8], usize, usize) -> usize;

/// A changed file of at most `most` bytes; None where `bytes` is no file that can be taken apart, or
/// the change made it too long.
pub fn mutate(bytes: &[u8], most: usize, seed: u64, bytewise: Bytewise) -> Option<Vec<u8>> {
    let mut rng = Rng(seed);
    let mut file = File::read(bytes)?;
    if rng.below(16) > 0 {
        file.drop_hash();
    }
    for _ in 0..1 + rng.below(3) {
        match rng.below(16) {
            0..=4 => page_bytes(&mut file, &mut rng, bytewise),
            5..=7 => floats(&mut file, &mut rng),
            8 => integers(&mut file, &mut rng),
            9..=10 => pairs(&mut file, &mut rng, bytewise),
            11 => pages(&mut file, &mut rng),
            12 => row_groups(&mut file, &mut rng),
            13 => values_of_page(&mut file, &mut rng),
            _ => {}
        }
    }
    file.fit();
    // What is changed after fitting does not fit: sizes, offsets, types, whole fields.
    if rng.below(4) == 0 {
        for _ in 0..1 + rng.below(2) {
            node(&mut file.footer, &mut rng, bytewise);
        }
    }
    if rng.below(8) == 0
        && let Some(chunk) = rng.pick_mut(&mut file.chunks)
        && let Some(page) = rng.pick_mut(chunk)
    {
        node(&mut page.header, &mut rng, bytewise);
    }
    Some(file.write()).filter(|file| file.len() <= most)
}

/// One file with some of the other's columns, rows or metadata.
pub fn cross(one: &[u8], other: &[u8], most: usize, seed: u64) -> Option<Vec<u8>> {
    let mut rng = Rng(seed);
    let (mut file, other) = (File::read(one)?, File::read(other)?);
    let shared = file.chunks.len().min(other.chunks.len());
    match rng.below(3) {
        0 => {
            let at = id::FILE_PAIRS;
            *file.footer.list_mut(at)? = other.footer.list(at)?.clone();
        }
        _ if shared == 0 => return None,
        1 => {
            let column = rng.below(shared);
            file.chunks[column] = other.chunks[column].clone();
        }
        // Columns that belong together lie side by side.
        _ => {
            let from = rng.below(shared);
            let to = (from + 1 + rng.below(4)).min(shared);
            file.chunks[from..to].clone_from_slice(&other.chunks[from..to]);
        }
    }
    file.drop_hash();
    file.fit();
    Some(file.write()).filter(|file| file.len() <= most)
}

fn page_bytes(file: &mut File, rng: &mut Rng, bytewise: Bytewise) {
    if let Some(chunk) = rng.pick_mut(&mut file.chunks)
        && let Some(page) = rng.pick_mut(chunk)
    {
        change(&mut page.body, rng, bytewise);
    }
}

fn change(bytes: &mut Vec<u8>, rng: &mut Rng, bytewise: Bytewise) {
    let size = bytes.len();
    // Mostly the length stays: another one is refused before the values are looked at.
    let most = if rng.below(4) == 0 { size + 16 } else { size };
    if most > 0 {
        bytes.resize(most, 0);
        let size = bytewise(bytes, size, most);
        bytes.truncate(size);
    }
}

/// Sets the same value of several columns of floats: what a position's checks see together.
fn floats(file: &mut File, rng: &mut Rng) {
    let at = rng.next();
    let columns = split_columns(file, FLOAT);
    for _ in 0..1 + rng.below(3) {
        let Some(&column) = rng.pick(&columns) else { return };
        let bits = match rng.below(4) {
            0 => rng.next() as u32,
            _ => rng.pick(&FLOATS).map_or(0, |float| float.to_bits()),
        };
        set(&mut file.chunks[column], at, bits.to_le_bytes());
    }
}

fn integers(file: &mut File, rng: &mut Rng) {
    let columns = split_columns(file, INT32);
    if let (Some(&column), Some(&value)) = (rng.pick(&columns), rng.pick(&INTEGERS)) {
        set(&mut file.chunks[column], rng.next(), (value as u32).to_le_bytes());
    }
}

/// Chunks of this physical type whose values are stored byte by byte and not compressed.
fn split_columns(file: &File, physical: i64) -> Vec<usize> {
    let split = |chunk: &Chunk| {
        let encoding = |page: &Page| page.header.field(id::PAGE_DATA)?.int(id::DATA_ENCODING);
        chunk.iter().all(|page| encoding(page) == Some(BYTE_STREAM_SPLIT))
    };
    let fits =
        |column: &Value| column.int(id::COLUMN_TYPE) == Some(physical) && column.int(id::COLUMN_CODEC) == Some(0);
    let columns = file.columns().into_iter().zip(&file.chunks).enumerate();
    columns.filter(|(_, (column, chunk))| fits(column) && split(chunk)).map(|(index, _)| index).collect()
}

/// Sets one value of a byte-stream-split chunk of four-byte values.
fn set(chunk: &mut Chunk, at: u64, value: [u8; 4]) {
    let Some(page) = chunk.first_mut() else { return };
    let count = page.values().and_then(|values| usize::try_from(values).ok()).unwrap_or(0);
    // The levels come first; the values take the page's end.
    let Some(start) = count.checked_mul(4).and_then(|bytes| page.body.len().checked_sub(bytes)) else { return };
    if count > 0 {
        let at = start + (at % count as u64) as usize;
        for (stream, byte) in value.into_iter().enumerate() {
            page.body[at + stream * count] = byte;
        }
    }
}

/// The header's keys and values.
fn pairs(file: &mut File, rng: &mut Rng, bytewise: Bytewise) {
    let Some(pairs) = file.footer.list_mut(id::FILE_PAIRS) else { return };
    let at = rng.below(pairs.len().max(1));
    let Some(pair) = pairs.get_mut(at) else { return };
    match rng.below(8) {
        0 => drop(pairs.remove(at)),
        1 => {
            let twice = pair.clone();
            pairs.push(twice);
        }
        2..=4 => {
            let number = *rng.pick(&INTEGERS).unwrap_or(&0);
            if let Some(Value::Binary(value)) = pair.field_mut(id::PAIR_VALUE) {
                *value = number.to_string().into_bytes();
            }
        }
        kind => {
            let field = if kind == 5 { id::PAIR_KEY } else { id::PAIR_VALUE };
            if let Some(Value::Binary(value)) = pair.field_mut(field) {
                change(value, rng, bytewise);
            }
        }
    }
}

/// Repeats, drops or cuts a page.
fn pages(file: &mut File, rng: &mut Rng) {
    let Some(chunk) = rng.pick_mut(&mut file.chunks) else { return };
    let at = rng.below(chunk.len().max(1));
    let Some(page) = chunk.get_mut(at) else { return };
    match rng.below(3) {
        0 => {
            let twice = page.clone();
            chunk.insert(at, twice);
        }
        1 => drop(chunk.remove(at)),
        _ => {
            let cut = rng.below(page.body.len().max(1));
            page.body.truncate(cut);
        }
    }
}

/// Repeats or drops a row group, or says that it has other rows.
fn row_groups(file: &mut File, rng: &mut Rng) {
    let File { chunks, footer } = file;
    let Some(groups) = footer.list_mut(id::FILE_ROW_GROUPS) else { return };
    let at = rng.below(groups.len().max(1));
    let start: usize = groups.iter().take(at).map(columns_of).sum();
    let last = groups.len() == 1;
    let Some(group) = groups.get_mut(at) else { return };
    let range = start..start + columns_of(group);
    match rng.below(4) {
        0 if !last => {
            groups.remove(at);
            chunks.drain(range);
        }
        1 => {
            let rows = group.int(id::GROUP_ROWS).unwrap_or(0);
            group.set_int(id::GROUP_ROWS, rows.wrapping_add(rng.below(5) as i64 - 2));
        }
        _ => {
            let twice = group.clone();
            groups.insert(at, twice);
            let again = chunks[range.clone()].to_vec();
            chunks.splice(range.start..range.start, again);
        }
    }
}

fn columns_of(group: &Value) -> usize {
    group.list(id::GROUP_COLUMNS).map_or(0, Vec::len)
}

/// Says that a page has another number of values.
fn values_of_page(file: &mut File, rng: &mut Rng) {
    if let Some(chunk) = rng.pick_mut(&mut file.chunks)
        && let Some(page) = rng.pick_mut(chunk)
    {
        let values = page.values().unwrap_or(0);
        let to = if rng.below(2) == 0 { values.wrapping_add(rng.below(5) as i64 - 2) } else { number(values, rng) };
        if let Some(data) = page.header.field_mut(id::PAGE_DATA) {
            data.set_int(id::DATA_VALUES, to);
        }
    }
}

/// Changes any node of a footer or a page header.
fn node(root: &mut Value, rng: &mut Rng, bytewise: Bytewise) {
    let nodes = root.nodes();
    let Some(node) = root.node_mut(rng.below(nodes)) else { return };
    match node {
        Value::Bool(truth) => *truth = !*truth,
        Value::Byte(byte) => *byte = rng.next() as u8,
        Value::Int(of, value) => match rng.below(8) {
            0 => *of = I64,
            _ => *value = number(*value, rng),
        },
        Value::Double(bytes) => *bytes = rng.next().to_le_bytes(),
        Value::Binary(bytes) => change(bytes, rng, bytewise),
        Value::List(_, of, values) => {
            let at = rng.below(values.len().max(1));
            match (rng.below(4), values.get(at).cloned()) {
                (0, _) => *of = rng.below(13) as u8,
                (1, Some(value)) => values.insert(at, value),
                (2, Some(_)) => drop(values.remove(at)),
                (_, Some(_)) => values.swap(0, at),
                _ => {}
            }
        }
        Value::Struct(fields) => {
            let at = rng.below(fields.len().max(1));
            match (rng.below(3), fields.get(at).cloned()) {
                (0, Some(field)) => fields.insert(at, field),
                (1, Some(_)) => drop(fields.remove(at)),
                (_, Some((id, _))) => fields[at].0 = id.wrapping_add(rng.below(7) as i16 - 3),
                _ => {}
            }
        }
    }
}

fn number(value: i64, rng: &mut Rng) -> i64 {
    match rng.below(4) {
        0 => value.wrapping_add(1),
        1 => value.wrapping_sub(1),
        2 => value ^ 1 << rng.below(32),
        _ => *rng.pick(&INTEGERS).unwrap_or(&0),
    }
}

/// SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014).
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Below `end`, which is not 0.
    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> Option<&'a T> {
        if from.is_empty() { None } else { from.get(self.below(from.len())) }
    }

    fn pick_mut<'a, T>(&mut self, from: &'a mut [T]) -> Option<&'a mut T> {
        if from.is_empty() { None } else { from.get_mut(self.below(from.len())) }
    }
}
