//! Reads a Parquet page header (Thrift's compact protocol) without trusting a length in it.

/// Deepest nesting followed; a page header has three levels.
const MAX_DEPTH: u32 = 8;

const TRUE: u8 = 1;
const FALSE: u8 = 2;
const BYTE: u8 = 3;
const I16: u8 = 4;
const I32: u8 = 5;
const I64: u8 = 6;
const DOUBLE: u8 = 7;
const BINARY: u8 = 8;
const LIST: u8 = 9;
const SET: u8 = 10;
const STRUCT: u8 = 12;

/// A version 1 data page's header; any other kind of page is refused.
#[derive(Debug, Default, PartialEq)]
pub(super) struct PageHeader {
    /// Size of the header itself.
    pub(super) header_bytes: usize,
    pub(super) uncompressed: u32,
    pub(super) compressed: u32,
    pub(super) num_values: u32,
    pub(super) encoding: i32,
    pub(super) definition_encoding: i32,
    pub(super) repetition_encoding: i32,
}

impl PageHeader {
    /// From the first bytes of a page, of which `left` are in its chunk.
    pub(super) fn read(bytes: &[u8], left: u64) -> Result<Self, String> {
        let mut input = Input { bytes, at: 0 };
        let mut page = Self::default();
        let (mut kind, mut data) = (None, false);
        let (mut uncompressed, mut compressed) = (None, None);
        let mut field = 0;
        while let Some(of) = input.field(&mut field)? {
            match (field, of) {
                (1, I32) => kind = Some(input.signed()?),
                (2, I32) => uncompressed = Some(input.signed()?),
                (3, I32) => compressed = Some(input.signed()?),
                (5, STRUCT) if !data => {
                    data = true;
                    page.data(&mut input)?;
                }
                _ => input.skip(of, MAX_DEPTH)?,
            }
        }
        if kind != Some(0) || !data {
            return Err("it is no data page of version 1".to_owned());
        }
        page.uncompressed = size(uncompressed, "uncompressed size")?;
        page.compressed = size(compressed, "compressed size")?;
        page.header_bytes = input.at;
        let left = left.saturating_sub(input.at as u64);
        if u64::from(page.compressed) > left {
            return Err(format!("it claims {} bytes, {left} are left", page.compressed));
        }
        Ok(page)
    }

    fn data(&mut self, input: &mut Input<'_>) -> Result<(), String> {
        let mut values = None;
        let mut encodings = [None; 3];
        let mut field = 0;
        while let Some(of) = input.field(&mut field)? {
            match (field, of) {
                (1, I32) => values = Some(input.signed()?),
                (2..=4, I32) => encodings[field as usize - 2] = Some(input.signed()?),
                _ => input.skip(of, MAX_DEPTH)?,
            }
        }
        self.num_values = size(values, "number of values")?;
        let [Some(encoding), Some(definition), Some(repetition)] = encodings else {
            return Err("it does not say its encodings".to_owned());
        };
        let narrow = |value: i64| i32::try_from(value).unwrap_or(-1);
        self.encoding = narrow(encoding);
        self.definition_encoding = narrow(definition);
        self.repetition_encoding = narrow(repetition);
        Ok(())
    }
}

/// Refuses a footer whose schema claims more children than it has elements, because the library takes
/// memory for what is claimed. A field of another type than the format's is refused too: the library
/// does not look at the type.
pub(super) fn check_footer(footer: &[u8]) -> Result<(), String> {
    let mut input = Input { bytes: footer, at: 0 };
    let mut field = 0;
    while let Some(of) = input.field(&mut field)? {
        match (field, of) {
            (2, LIST) => input.schema()?,
            (1, I32) | (3, I64) | (4 | 5 | 7, LIST) | (6, BINARY) => input.skip(of, MAX_DEPTH)?,
            (1..=7, _) => return Err(format!("field {field} is of type {of}")),
            _ => input.skip(of, MAX_DEPTH)?,
        }
    }
    Ok(())
}

fn size(value: Option<i64>, what: &str) -> Result<u32, String> {
    let value = value.ok_or_else(|| format!("it does not say its {what}"))?;
    i32::try_from(value).ok().and_then(|value| u32::try_from(value).ok()).ok_or(format!("its {what} is {value}"))
}

struct Input<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Input<'_> {
    /// Type of the next field, whose id replaces `field`; None at the struct's end.
    fn field(&mut self, field: &mut i64) -> Result<Option<u8>, String> {
        let byte = self.byte()?;
        if byte == 0 {
            return Ok(None);
        }
        *field = match byte >> 4 {
            0 => self.signed()?,
            step => field.saturating_add(i64::from(step)),
        };
        Ok(Some(byte & 15))
    }

    /// The list of a footer's schema elements.
    fn schema(&mut self) -> Result<(), String> {
        let head = self.byte()?;
        let length = match head >> 4 {
            15 => self.unsigned()?,
            length => u64::from(length),
        };
        if head & 15 != STRUCT || length > (self.bytes.len() - self.at) as u64 {
            return Err(format!("its schema claims {length} elements"));
        }
        for _ in 0..length {
            let mut field = 0;
            while let Some(of) = self.field(&mut field)? {
                match (field, of) {
                    (5, I32) => {
                        let children = self.signed()?;
                        if u64::try_from(children).map_or(true, |children| children > length) {
                            return Err(format!("a group of its {length} schema elements claims {children} children"));
                        }
                    }
                    (1..=3 | 6..=9, I32) | (4, BINARY) | (10, STRUCT) => self.skip(of, MAX_DEPTH)?,
                    (1..=10, _) => return Err(format!("field {field} of its schema is of type {of}")),
                    _ => self.skip(of, MAX_DEPTH)?,
                }
            }
        }
        Ok(())
    }

    fn byte(&mut self) -> Result<u8, String> {
        let byte = *self.bytes.get(self.at).ok_or("its header is cut short")?;
        self.at += 1;
        Ok(byte)
    }

    fn unsigned(&mut self) -> Result<u64, String> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 127) << shift;
            if byte & 128 == 0 {
                return Ok(value);
            }
        }
        Err("a number in its header has no end".to_owned())
    }

    fn signed(&mut self) -> Result<i64, String> {
        let value = self.unsigned()?;
        Ok((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    fn advance(&mut self, by: u64) -> Result<(), String> {
        let left = (self.bytes.len() - self.at) as u64;
        if by > left {
            return Err(format!("a field of its header claims {by} bytes, {left} are left"));
        }
        self.at += by as usize;
        Ok(())
    }

    fn skip(&mut self, of: u8, depth: u32) -> Result<(), String> {
        let depth = depth.checked_sub(1).ok_or("its header is nested too deep")?;
        match of {
            TRUE | FALSE => Ok(()),
            BYTE => self.advance(1),
            I16 | I32 | I64 => self.unsigned().map(|_| ()),
            DOUBLE => self.advance(8),
            BINARY => {
                let length = self.unsigned()?;
                self.advance(length)
            }
            LIST | SET => {
                let head = self.byte()?;
                let length = match head >> 4 {
                    15 => self.unsigned()?,
                    length => u64::from(length),
                };
                if length > (self.bytes.len() - self.at) as u64 {
                    return Err(format!("a list in its header claims {length} elements"));
                }
                for _ in 0..length {
                    match head & 15 {
                        TRUE | FALSE => self.advance(1)?, // an element takes a byte, a field none
                        of => self.skip(of, depth)?,
                    }
                }
                Ok(())
            }
            STRUCT => {
                let mut field = 0;
                while let Some(of) = self.field(&mut field)? {
                    self.skip(of, depth)?;
                }
                Ok(())
            }
            other => Err(format!("its header has a field of unknown type {other}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Data page, 300 -> 20 bytes, 7 values, PLAIN with RLE levels.
    const PAGE: &[u8] = &[0x15, 0, 0x15, 0xd8, 4, 0x15, 40, 0x2c, 0x15, 14, 0x15, 0, 0x15, 6, 0x15, 6, 0, 0];

    fn with_body(header: &[u8]) -> Vec<u8> {
        [header, &[7; 20]].concat()
    }

    fn read(bytes: &[u8]) -> Result<PageHeader, String> {
        PageHeader::read(bytes, bytes.len() as u64)
    }

    #[test]
    fn reads_a_data_page() {
        let page = read(&with_body(PAGE)).unwrap();
        let expected = PageHeader {
            header_bytes: PAGE.len(),
            uncompressed: 300,
            compressed: 20,
            num_values: 7,
            encoding: 0,
            definition_encoding: 3,
            repetition_encoding: 3,
        };
        assert_eq!(page, expected);
    }

    #[test]
    fn a_length_beyond_the_file_is_refused_before_memory_is_taken() {
        // Field 5's struct holds a binary that claims 2^62 bytes.
        let hostile = [0x15, 0, 0x15, 2, 0x15, 2, 0x2c, 0x58, 255, 255, 255, 255, 255, 255, 255, 255, 63, 0, 0];
        let error = read(&hostile).unwrap_err();
        assert!(error.contains("claims"), "{error}");
        for cut in 0..PAGE.len() {
            assert!(read(&PAGE[..cut]).is_err());
        }
        assert!(read(&[0x1c; 64]).unwrap_err().contains("nested too deep"));
    }
}
