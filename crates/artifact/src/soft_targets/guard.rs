//! Looks at a file's structure before the Parquet library does, so that no number in the file
//! decides how much memory is taken.
//!
//! The library trusts page headers: a length in one becomes an allocation. So every page header
//! is read here first, each size is held against the file's own length, the limits and the number
//! of values, and any kind of page that no version writes is refused.

mod thrift;

use std::{
    cell::Cell,
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Once},
};

use parquet::{
    arrow::ArrowSchemaConverter,
    basic::{Compression, Encoding, Type},
    file::{
        metadata::{ColumnChunkMetaData, ParquetMetaData, ParquetMetaDataReader, RowGroupMetaData},
        reader::{ChunkReader as _, Length as _},
    },
};
use retort_core::{Code, Error, Result};
use sha2::{Digest, Sha256};

use self::thrift::PageHeader;
use super::{
    Header, Limits, Source,
    schema::{self, CONTENT_KEY, Column, Per},
    v1,
};
use crate::hash::hex;

const MAGIC: &[u8] = b"PAR1";
/// Magic at both ends and the footer's length.
const MIN_BYTES: u64 = 12;
/// Room for some hundreds of row groups; each byte of a hostile one can become hundreds in memory.
const MAX_FOOTER: u64 = 512 << 10;
/// A header without statistics takes a small part of it.
const MAX_PAGE_HEADER: u64 = 4 << 10;
/// Row ids, tags and finish reasons of a shard, each: many row groups may point at the same pages.
const MAX_TEXT: u64 = 64 << 20;

/// Of one row group; ours have a sixteenth of it.
const MAX_TOKENS: u64 = 64 << 20;

/// A file whose structure holds; its values are not looked at yet.
pub(super) struct Opened {
    pub(super) header: Header,
    pub(super) metadata: Arc<ParquetMetaData>,
    pub(super) rows: u64,
    /// Support entries of all row groups.
    pub(super) entries: u64,
}

/// The columns of a version.
pub(super) fn columns(header: &Header) -> &'static [Column] {
    if header.schema_version == 1 { &v1::COLUMNS } else { &schema::COLUMNS }
}

/// Checks everything that can be checked without reading a value.
pub(super) fn open(source: &Source, limits: &Limits) -> Result<Opened> {
    if source.len() > limits.max_bytes {
        return Err(too_large(format!("{} bytes", source.len()), format!("{} bytes", limits.max_bytes)));
    }
    let footer_start = footer_start(source)?;
    let footer = read(source, footer_start, (source.len() - 8 - footer_start) as usize)?;
    thrift::check_footer(&footer).map_err(|why| corrupt(format!("its footer cannot be read: {why}")))?;
    let metadata = guarded(|| ParquetMetaDataReader::decode_metadata(&footer))?
        .map_err(|error| corrupt(format!("its footer cannot be read: {error}")))?;
    let pairs = pairs(&metadata)?;
    let header = Header::from_pairs(&pairs)?;
    if let Some(&expected) = pairs.get(CONTENT_KEY) {
        let found = content_sha256(source.hash(footer_start)?, &header);
        if found != expected {
            return Err(corrupt(format!(
                "its content has sha256 {found}, its metadata says {expected:.64}; the file was damaged, or \
                 rewritten by a program that kept {CONTENT_KEY}"
            )));
        }
    }
    check_schema(&metadata, columns(&header))?;
    let (rows, entries) = check_sizes(source, footer_start, &metadata, &header, limits)?;
    Ok(Opened { header, metadata: Arc::new(metadata), rows, entries })
}

/// SHA-256 of all bytes before the footer, which `pages` has seen, then of the header without its
/// epoch. Two attempts at one shard that computed the same have the same.
pub(super) fn content_sha256(mut pages: Sha256, header: &Header) -> String {
    for (key, value) in header.pairs().iter().filter(|(key, _)| *key != "retort.epoch") {
        for part in [*key, value.as_str()] {
            pages.update((part.len() as u64).to_le_bytes());
            pages.update(part.as_bytes());
        }
    }
    hex(&pages.finalize())
}

fn read(source: &Source, at: u64, length: usize) -> Result<bytes::Bytes> {
    source.get_bytes(at, length).map_err(|error| corrupt(format!("it cannot be read at {at}: {error}")))
}

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Runs library code on a file's bytes; a panic there means the file is corrupt, not that we are, so
/// it becomes an error and prints nothing.
pub(super) fn guarded<T>(run: impl FnOnce() -> T) -> Result<T> {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| {
        let others = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !GUARDED.get() {
                others(panic);
            }
        }));
    });
    GUARDED.set(true);
    let done = catch_unwind(AssertUnwindSafe(run));
    GUARDED.set(false);
    done.map_err(|_| corrupt("the parquet library gave up on it".to_owned()))
}

pub(super) fn corrupt(why: String) -> Error {
    Error::new(Code::ShardCorrupt, format!("the shard is corrupt: {why}"))
}

fn too_large(has: String, limit: String) -> Error {
    Error::new(
        Code::ObjectTooLarge,
        format!("the shard has {has}, at most {limit} are read; use fewer or shorter rows a shard"),
    )
}

fn footer_start(source: &Source) -> Result<u64> {
    let size = source.len();
    if size < MIN_BYTES {
        return Err(corrupt(format!("{size} bytes are too few for a parquet file")));
    }
    let (first, last) = (read(source, 0, 4)?, read(source, size - 8, 8)?);
    if first != MAGIC || &last[4..] != MAGIC {
        return Err(corrupt("it does not begin and end with PAR1, so it is cut short or no parquet file".to_owned()));
    }
    let length = last[..4].iter().rev().fold(0u64, |sum, &byte| sum << 8 | u64::from(byte));
    if length > MAX_FOOTER || length > size - MIN_BYTES {
        return Err(corrupt(format!("its footer claims {length} bytes")));
    }
    Ok(size - 8 - length)
}

fn pairs(metadata: &ParquetMetaData) -> Result<BTreeMap<&str, &str>> {
    let all = metadata.file_metadata().key_value_metadata().map(Vec::as_slice).unwrap_or_default();
    let mut pairs = BTreeMap::new();
    for pair in all.iter().filter(|pair| pair.key.starts_with("retort.")) {
        if pairs.insert(pair.key.as_str(), pair.value.as_deref().unwrap_or_default()).is_some() {
            return Err(corrupt(format!("its metadata has {:.80} twice", pair.key)));
        }
    }
    if pairs.is_empty() {
        return Err(corrupt("its metadata has no retort keys; it is a parquet file of another kind".to_owned()));
    }
    Ok(pairs)
}

fn check_schema(metadata: &ParquetMetaData, columns: &[Column]) -> Result<()> {
    let expected = ArrowSchemaConverter::new()
        .convert(&schema::schema(columns))
        .map_err(|error| Error::internal(format!("the soft-target schema does not convert: {error}")))?;
    let found = metadata.file_metadata().schema_descr();
    if found.num_columns() != expected.num_columns() {
        return Err(corrupt(format!("it has {} columns, not {}", found.num_columns(), expected.num_columns())));
    }
    for (found, expected) in found.columns().iter().zip(expected.columns()) {
        let same = found.path() == expected.path()
            && found.physical_type() == expected.physical_type()
            && found.logical_type_ref() == expected.logical_type_ref()
            && found.max_def_level() == expected.max_def_level()
            && found.max_rep_level() == expected.max_rep_level();
        if !same {
            return Err(corrupt(format!(
                "its column {:.80} is not {expected_name}",
                found.path().string(),
                expected_name = expected.path().string()
            )));
        }
    }
    Ok(())
}

/// Holds rows, values and pages against the limits and the file's length; rows and entries of all row
/// groups.
fn check_sizes(
    source: &Source,
    footer_start: u64,
    metadata: &ParquetMetaData,
    header: &Header,
    limits: &Limits,
) -> Result<(u64, u64)> {
    let rows = u64::try_from(metadata.file_metadata().num_rows())
        .map_err(|_| corrupt("its number of rows is negative".to_owned()))?;
    if rows > limits.max_rows {
        return Err(too_large(format!("{rows} rows"), format!("{} rows", limits.max_rows)));
    }
    let (mut group_rows, mut entries) = (0u64, 0u64);
    let mut texts = vec![0; columns(header).len()];
    for group in metadata.row_groups() {
        let rows = u64::try_from(group.num_rows()).map_err(|_| corrupt("a row group has negative rows".to_owned()))?;
        group_rows = group_rows.saturating_add(rows);
        entries = entries.saturating_add(check_group(source, footer_start, group, rows, header, limits, &mut texts)?);
    }
    if group_rows != rows {
        return Err(corrupt(format!("its row groups have {group_rows} rows, the file says {rows}")));
    }
    Ok((rows, entries))
}

/// Holds one row group's columns against the limits; the number of its entries.
fn check_group(
    source: &Source,
    footer_start: u64,
    group: &RowGroupMetaData,
    rows: u64,
    header: &Header,
    limits: &Limits,
    texts: &mut [u64],
) -> Result<u64> {
    let columns = columns(header);
    if group.columns().len() != columns.len() {
        return Err(corrupt(format!("a row group has {} columns", group.columns().len())));
    }
    // Of the row group, from the first column of tokens on: what the file has of them.
    let mut tokens = rows.saturating_mul(limits.max_tokens_per_row).min(MAX_TOKENS);
    let temperatures = header.soft_targets.temperatures.len() as u64;
    let mut entries = 0;
    for ((column, chunk), text) in columns.iter().zip(group.columns()).zip(texts) {
        let max = match column.per {
            Per::Row => rows,
            Per::Tag | Per::Token | Per::Target => tokens,
            Per::Temperature => tokens.saturating_mul(temperatures),
            Per::Entry => limits.max_entries.min(tokens.saturating_mul(header.max_support())),
            Per::Vocabulary => header.vocab_size.into(),
        };
        let values = check_pages(source, footer_start, chunk, text)?;
        // An empty list counts as one value.
        let max = max.saturating_add(rows);
        if values > max {
            return Err(too_large(format!("{values} values of {}", column.name), format!("{max} values")));
        }
        match column.per {
            Per::Token => tokens = values,
            Per::Entry => entries = values.max(entries),
            _ => {}
        }
    }
    Ok(entries)
}

/// Walks the pages of one column chunk; the number of its values. `text` sums the column's bytes of
/// text over row groups.
fn check_pages(source: &Source, footer_start: u64, column: &ColumnChunkMetaData, text: &mut u64) -> Result<u64> {
    let name = column.column_path().string();
    let bad = |why: String| corrupt(format!("column {name}: {why}"));
    if !matches!(column.compression(), Compression::ZSTD(_) | Compression::UNCOMPRESSED) {
        return Err(bad(format!("it is compressed with {}, which is not zstd", column.compression())));
    }
    if column.dictionary_page_offset().is_some() {
        return Err(bad("it has a dictionary, which no version has".to_owned()));
    }
    let claimed = u64::try_from(column.num_values()).map_err(|_| bad("it has negative values".to_owned()))?;
    let offset = u64::try_from(column.data_page_offset()).map_err(|_| bad("its offset is negative".to_owned()))?;
    let length = u64::try_from(column.compressed_size()).map_err(|_| bad("its size is negative".to_owned()))?;
    let end = offset.checked_add(length).filter(|&end| end <= footer_start);
    let end = end.ok_or_else(|| bad(format!("it claims {length} bytes at {offset}, outside the file")))?;
    let (mut at, mut values) = (offset, 0u64);
    while at < end {
        let start = read(source, at, (end - at).min(MAX_PAGE_HEADER) as usize)?;
        let page = PageHeader::read(&start, end - at).map_err(|why| bad(format!("the page at {at}: {why}")))?;
        check_page(column, &page, claimed - values).map_err(|why| bad(format!("the page at {at}: {why}")))?;
        values += u64::from(page.num_values);
        if column.column_type() == Type::BYTE_ARRAY {
            *text += u64::from(page.uncompressed);
        }
        at += page.header_bytes as u64 + u64::from(page.compressed);
    }
    if at != end || values != claimed {
        return Err(bad(format!("its pages have {values} values and end at {at}, not {claimed} and {end}")));
    }
    if *text > MAX_TEXT {
        return Err(too_large(format!("{text} bytes of {name}"), format!("{MAX_TEXT} bytes")));
    }
    Ok(values)
}

fn check_page(column: &ColumnChunkMetaData, page: &PageHeader, left: u64) -> Result<(), String> {
    let integer = matches!(column.column_type(), Type::INT32 | Type::INT64);
    let known = match page.encoding {
        code if code == Encoding::PLAIN as i32 => true,
        code if code == Encoding::RLE as i32 => column.column_type() == Type::BOOLEAN,
        code if code == Encoding::DELTA_BINARY_PACKED as i32 => integer,
        code if code == Encoding::BYTE_STREAM_SPLIT as i32 => integer || column.column_type() == Type::FLOAT,
        _ => false,
    };
    let levels = Encoding::RLE as i32;
    if !known || page.definition_encoding != levels || page.repetition_encoding != levels {
        return Err(format!("encoding {} is not one that shards have", page.encoding));
    }
    if u64::from(page.num_values) > left {
        return Err(format!("{} values are more than the {left} left", page.num_values));
    }
    let most = match column.column_type() {
        Type::BYTE_ARRAY => MAX_TEXT,
        // Eight bytes the value and two levels of up to a byte, with room for run headers.
        _ => u64::from(page.num_values) * 12 + 4096,
    };
    if u64::from(page.uncompressed) > most {
        return Err(format!("{} bytes for {} values", page.uncompressed, page.num_values));
    }
    if column.compression() == Compression::UNCOMPRESSED && page.uncompressed != page.compressed {
        return Err("two sizes of an uncompressed page differ".to_owned());
    }
    Ok(())
}
