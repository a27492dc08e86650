//! Columns of each version and how they are laid down in Parquet.

use std::sync::Arc;

use arrow_schema::{DataType, Field, Schema, SchemaRef};
use parquet::{
    basic::{Compression, Encoding, ZstdLevel},
    file::properties::{EnabledStatistics, WriterProperties},
    schema::types::ColumnPath,
};
use retort_core::{Error, Result};

/// Metadata key of the hash over the pages and the header, the epoch left out.
pub(super) const CONTENT_KEY: &str = "retort.content_sha256";

const CREATED_BY: &str = "retort version 2 (build soft-targets)";
const ZSTD_LEVEL: i32 = 9;

/// What a column's values are counted by, which bounds how many there can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Per {
    Row,
    Tag,
    Token,
    /// At most one for each token.
    Target,
    /// As many for each target as there are temperatures besides 1.
    Temperature,
    Entry,
    /// At most the vocabulary, for each row group.
    Vocabulary,
}

/// A column's name, its type and the encoding that was smallest for it.
#[derive(Clone, Copy)]
pub(super) struct Column {
    pub(super) name: &'static str,
    pub(super) data_type: fn() -> DataType,
    pub(super) encoding: Encoding,
    pub(super) per: Per,
}

pub(super) const ROW_ID: usize = 0;
pub(super) const ROW: usize = 1;
pub(super) const TAGS: usize = 2;
pub(super) const TOKEN_IDS: usize = 3;
pub(super) const TARGET_MASK: usize = 4;
pub(super) const FINISH_REASON: usize = 5;
// The columns above are those of version 1 too.
pub(super) const ID_TABLE: usize = 6;
pub(super) const HEAD_SIZE: usize = 7;
pub(super) const HEAD_DELTA: usize = 8;
pub(super) const HEAD_Q: usize = 9;
pub(super) const HEAD_LOGPROB: usize = 10;
pub(super) const TAIL_SIZE: usize = 11;
pub(super) const TAIL_DELTA: usize = 12;
pub(super) const TAIL_COUNT: usize = 13;
pub(super) const TAIL_Q: usize = 14;
pub(super) const MAX_LOGPROB: usize = 15;
pub(super) const TAIL_MASS: usize = 16;
pub(super) const LABEL_LOGPROB: usize = 17;
pub(super) const LOG_SUM_EXP: usize = 18;

pub(super) const fn column(name: &'static str, data_type: fn() -> DataType, encoding: Encoding, per: Per) -> Column {
    Column { name, data_type, encoding, per }
}

/// In file order; the constants above index it.
pub(super) const COLUMNS: [Column; 19] = {
    use Encoding::{BYTE_STREAM_SPLIT, DELTA_BINARY_PACKED, PLAIN, RLE};
    [
        column("row_id", || DataType::Utf8, PLAIN, Per::Row),
        column("row", || DataType::UInt64, DELTA_BINARY_PACKED, Per::Row),
        column("tags", || list(DataType::Utf8), PLAIN, Per::Tag),
        column("token_ids", || list(DataType::UInt32), BYTE_STREAM_SPLIT, Per::Token),
        column("target_mask", || list(DataType::Boolean), RLE, Per::Token),
        column("finish_reason", || DataType::Utf8, PLAIN, Per::Row),
        column("id_table", || list(DataType::UInt32), BYTE_STREAM_SPLIT, Per::Vocabulary),
        column("head_size", || list(DataType::UInt32), BYTE_STREAM_SPLIT, Per::Target),
        column("head_delta", || list(DataType::UInt32), BYTE_STREAM_SPLIT, Per::Entry),
        column("head_q", || list(DataType::UInt8), BYTE_STREAM_SPLIT, Per::Entry),
        column("head_logprob", || list(DataType::Float32), BYTE_STREAM_SPLIT, Per::Entry),
        column("tail_size", || list(DataType::UInt32), BYTE_STREAM_SPLIT, Per::Target),
        column("tail_delta", || list(DataType::UInt32), BYTE_STREAM_SPLIT, Per::Entry),
        column("tail_count", || list(DataType::UInt8), BYTE_STREAM_SPLIT, Per::Entry),
        column("tail_q", || list(DataType::UInt8), BYTE_STREAM_SPLIT, Per::Entry),
        column("max_logprob", || list(DataType::Float32), BYTE_STREAM_SPLIT, Per::Target),
        column("tail_mass", || list(DataType::Float32), BYTE_STREAM_SPLIT, Per::Target),
        column("label_logprob", || list(DataType::Float32), BYTE_STREAM_SPLIT, Per::Target),
        column("log_sum_exp", || list(DataType::Float32), BYTE_STREAM_SPLIT, Per::Temperature),
    ]
};

pub(super) fn schema(columns: &[Column]) -> SchemaRef {
    Arc::new(Schema::new(
        columns.iter().map(|column| Field::new(column.name, (column.data_type)(), false)).collect::<Vec<_>>(),
    ))
}

/// The one element field of every list, named as the Parquet format wants it.
pub(super) fn element(data_type: DataType) -> Arc<Field> {
    Arc::new(Field::new("element", data_type, false))
}

pub(super) fn list(data_type: DataType) -> DataType {
    DataType::List(element(data_type))
}

/// Path of the column's values: lists hold theirs two levels down.
fn path(column: &Column) -> ColumnPath {
    let mut parts = vec![column.name.to_owned()];
    if matches!((column.data_type)(), DataType::List(_)) {
        parts.extend(["list".to_owned(), "element".to_owned()]);
    }
    ColumnPath::new(parts)
}

/// No statistics, no indexes, no dictionaries, a fixed writer name: the same rows give the same
/// bytes, and a reader has few kinds of page to be careful with.
pub(super) fn writer_properties() -> Result<WriterProperties> {
    let level = ZstdLevel::try_new(ZSTD_LEVEL).map_err(|error| Error::internal(format!("zstd level: {error}")))?;
    let mut properties = WriterProperties::builder()
        .set_created_by(CREATED_BY.to_owned())
        .set_compression(Compression::ZSTD(level))
        .set_dictionary_enabled(false)
        .set_statistics_enabled(EnabledStatistics::None)
        .set_offset_index_disabled(true)
        .set_max_row_group_row_count(Some(usize::MAX));
    for column in &COLUMNS {
        properties = properties.set_column_encoding(path(column), column.encoding);
    }
    Ok(properties.build())
}
