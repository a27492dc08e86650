//! A Parquet file as page headers, page bytes and footer, to be changed and put together again.

use super::thrift::Value;

const MAGIC: &[u8] = b"PAR1";

/// Field ids of the Parquet format's Thrift structs, as far as they are needed here.
pub mod id {
    pub const FILE_ROWS: i16 = 3;
    pub const FILE_ROW_GROUPS: i16 = 4;
    pub const FILE_PAIRS: i16 = 5;
    pub const GROUP_COLUMNS: i16 = 1;
    pub const GROUP_ROWS: i16 = 3;
    pub const CHUNK_METADATA: i16 = 3;
    pub const COLUMN_TYPE: i16 = 1;
    pub const COLUMN_CODEC: i16 = 4;
    pub const COLUMN_VALUES: i16 = 5;
    pub const COLUMN_UNCOMPRESSED: i16 = 6;
    pub const COLUMN_COMPRESSED: i16 = 7;
    pub const COLUMN_OFFSET: i16 = 9;
    pub const PAGE_UNCOMPRESSED: i16 = 2;
    pub const PAGE_COMPRESSED: i16 = 3;
    pub const PAGE_DATA: i16 = 5;
    pub const DATA_VALUES: i16 = 1;
    pub const DATA_ENCODING: i16 = 2;
    pub const PAIR_KEY: i16 = 1;
    pub const PAIR_VALUE: i16 = 2;
}

#[derive(Clone, Debug)]
pub struct Page {
    pub header: Value,
    /// As stored: compressed if the column is.
    pub body: Vec<u8>,
}

/// The pages of one column in one row group.
pub type Chunk = Vec<Page>;

#[derive(Clone, Debug)]
pub struct File {
    /// Row group by row group, in the order of its columns.
    pub chunks: Vec<Chunk>,
    pub footer: Value,
}

impl File {
    /// None where the structure does not hold, so that there is nothing to take apart.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        let body = bytes.strip_suffix(MAGIC)?;
        let (body, length) = body.split_last_chunk::<4>()?;
        let start = body.len().checked_sub(u32::from_le_bytes(*length) as usize)?;
        let (footer, _) = Value::read(&body[start..])?;
        let columns = footer.list(id::FILE_ROW_GROUPS)?.iter().map(|group| group.list(id::GROUP_COLUMNS));
        let mut chunks = Vec::new();
        let mut left = body.len();
        for column in columns.collect::<Option<Vec<_>>>()?.into_iter().flatten() {
            let metadata = column.field(id::CHUNK_METADATA)?;
            let offset = usize::try_from(metadata.int(id::COLUMN_OFFSET)?).ok()?;
            let length = usize::try_from(metadata.int(id::COLUMN_COMPRESSED)?).ok()?;
            // Chunks may lie over each other; taken apart they must not become more than the file.
            left = left.checked_sub(length)?;
            chunks.push(pages(body.get(offset..)?.get(..length)?)?);
        }
        Some(Self { chunks, footer })
    }

    /// Makes offsets and sizes in page headers and footer fit the pages.
    pub fn fit(&mut self) {
        let mut at = MAGIC.len();
        let mut chunks = self.chunks.iter_mut();
        for group in self.footer.list_mut(id::FILE_ROW_GROUPS).into_iter().flatten() {
            for column in group.list_mut(id::GROUP_COLUMNS).into_iter().flatten() {
                let (Some(metadata), Some(chunk)) = (column.field_mut(id::CHUNK_METADATA), chunks.next()) else {
                    continue;
                };
                let plain = metadata.int(id::COLUMN_CODEC) == Some(0);
                let (mut values, mut stored, mut unpacked) = (0i64, 0, 0i64);
                for page in chunk {
                    page.header.set_int(id::PAGE_COMPRESSED, page.body.len() as i64);
                    if plain {
                        page.header.set_int(id::PAGE_UNCOMPRESSED, page.body.len() as i64);
                    }
                    let mut header = Vec::new();
                    page.header.write(&mut header);
                    stored += header.len() + page.body.len();
                    let body = page.header.int(id::PAGE_UNCOMPRESSED).unwrap_or(0);
                    unpacked = unpacked.saturating_add(body).saturating_add(header.len() as i64);
                    values = values.saturating_add(page.values().unwrap_or(0));
                }
                metadata.set_int(id::COLUMN_OFFSET, at as i64);
                metadata.set_int(id::COLUMN_COMPRESSED, stored as i64);
                metadata.set_int(id::COLUMN_UNCOMPRESSED, unpacked);
                metadata.set_int(id::COLUMN_VALUES, values);
                at += stored;
            }
        }
        let rows = self.footer.list(id::FILE_ROW_GROUPS).into_iter().flatten();
        let rows = rows.filter_map(|group| group.int(id::GROUP_ROWS)).fold(0i64, i64::saturating_add);
        self.footer.set_int(id::FILE_ROWS, rows);
    }

    pub fn write(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        for page in self.chunks.iter().flatten() {
            page.header.write(&mut bytes);
            bytes.extend(&page.body);
        }
        let start = bytes.len();
        self.footer.write(&mut bytes);
        bytes.extend(((bytes.len() - start) as u32).to_le_bytes());
        bytes.extend(MAGIC);
        bytes
    }

    /// The footer's metadata of every chunk, in the order of `chunks`.
    pub fn columns(&self) -> Vec<&Value> {
        let groups = self.footer.list(id::FILE_ROW_GROUPS).into_iter().flatten();
        groups
            .filter_map(|group| group.list(id::GROUP_COLUMNS))
            .flatten()
            .filter_map(|column| column.field(id::CHUNK_METADATA))
            .collect()
    }

    /// Takes the content's hash out of the metadata, so that a change is not just found by it.
    pub fn drop_hash(&mut self) {
        if let Some(pairs) = self.footer.list_mut(id::FILE_PAIRS) {
            let hash = Value::Binary(b"retort.content_sha256".to_vec());
            pairs.retain(|pair| pair.field(id::PAIR_KEY) != Some(&hash));
        }
    }
}

impl Page {
    /// What its header says, for a page of values.
    pub fn values(&self) -> Option<i64> {
        self.header.field(id::PAGE_DATA)?.int(id::DATA_VALUES)
    }
}

fn pages(bytes: &[u8]) -> Option<Chunk> {
    let (mut at, mut pages) = (0, Chunk::new());
    while at < bytes.len() {
        let (header, length) = Value::read(&bytes[at..])?;
        let body = usize::try_from(header.int(id::PAGE_COMPRESSED)?).ok()?;
        at += length;
        pages.push(Page { header, body: bytes[at..].get(..body)?.to_vec() });
        at += body;
    }
    Some(pages)
}
