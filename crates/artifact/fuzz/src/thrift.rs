//! Thrift's compact protocol as a tree that can be changed and written again: a Parquet footer or page
//! header whatever its fields mean.

/// Deepest nesting followed; a Parquet footer has about ten levels.
const MAX_DEPTH: u32 = 16;

pub const TRUE: u8 = 1;
pub const FALSE: u8 = 2;
pub const BYTE: u8 = 3;
pub const I16: u8 = 4;
pub const I32: u8 = 5;
pub const I64: u8 = 6;
pub const DOUBLE: u8 = 7;
pub const BINARY: u8 = 8;
pub const LIST: u8 = 9;
pub const SET: u8 = 10;
pub const STRUCT: u8 = 12;

#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Bool(bool),
    Byte(u8),
    /// With its wire type: [`I16`], [`I32`] or [`I64`].
    Int(u8, i64),
    Double([u8; 8]),
    Binary(Vec<u8>),
    /// With its own type ([`LIST`] or [`SET`]) and its elements'.
    List(u8, u8, Vec<Value>),
    /// Fields by id, in file order.
    Struct(Vec<(i16, Value)>),
}

impl Value {
    /// A struct from the start of `bytes`, and how many bytes it takes. None if it is malformed.
    pub fn read(bytes: &[u8]) -> Option<(Self, usize)> {
        let mut input = Input { bytes, at: 0 };
        let value = input.value(STRUCT, MAX_DEPTH)?;
        Some((value, input.at))
    }

    pub fn write(&self, into: &mut Vec<u8>) {
        match self {
            // As an element; a field's truth is in its type.
            Self::Bool(truth) => into.push(if *truth { TRUE } else { FALSE }),
            Self::Byte(byte) => into.push(*byte),
            Self::Int(_, value) => write_signed(*value, into),
            Self::Double(bytes) => into.extend(bytes),
            Self::Binary(bytes) => {
                write_unsigned(bytes.len() as u64, into);
                into.extend(bytes);
            }
            Self::List(_, of, values) => {
                match values.len() {
                    short @ 0..15 => into.push((short as u8) << 4 | of),
                    long => {
                        into.push(0xf0 | of);
                        write_unsigned(long as u64, into);
                    }
                }
                values.iter().for_each(|value| value.write(into));
            }
            Self::Struct(fields) => {
                let mut before = 0i16;
                for (id, value) in fields {
                    let step = i32::from(*id) - i32::from(before);
                    if (1..=15).contains(&step) {
                        into.push((step as u8) << 4 | value.wire_type());
                    } else {
                        into.push(value.wire_type());
                        write_signed(i64::from(*id), into);
                    }
                    before = *id;
                    if !matches!(value, Self::Bool(_)) {
                        value.write(into);
                    }
                }
                into.push(0);
            }
        }
    }

    fn wire_type(&self) -> u8 {
        match self {
            Self::Bool(true) => TRUE,
            Self::Bool(false) => FALSE,
            Self::Byte(_) => BYTE,
            Self::Int(of, _) | Self::List(of, ..) => *of,
            Self::Double(_) => DOUBLE,
            Self::Binary(_) => BINARY,
            Self::Struct(_) => STRUCT,
        }
    }

    /// Field `id` of a struct.
    pub fn field(&self, id: i16) -> Option<&Self> {
        match self {
            Self::Struct(fields) => fields.iter().find(|(field, _)| *field == id).map(|(_, value)| value),
            _ => None,
        }
    }

    pub fn field_mut(&mut self, id: i16) -> Option<&mut Self> {
        match self {
            Self::Struct(fields) => fields.iter_mut().find(|(field, _)| *field == id).map(|(_, value)| value),
            _ => None,
        }
    }

    pub fn int(&self, id: i16) -> Option<i64> {
        match self.field(id) {
            Some(Self::Int(_, value)) => Some(*value),
            _ => None,
        }
    }

    /// Changes a number field that is there.
    pub fn set_int(&mut self, id: i16, to: i64) {
        if let Some(Self::Int(_, value)) = self.field_mut(id) {
            *value = to;
        }
    }

    pub fn list(&self, id: i16) -> Option<&Vec<Self>> {
        match self.field(id) {
            Some(Self::List(_, _, values)) => Some(values),
            _ => None,
        }
    }

    pub fn list_mut(&mut self, id: i16) -> Option<&mut Vec<Self>> {
        match self.field_mut(id) {
            Some(Self::List(_, _, values)) => Some(values),
            _ => None,
        }
    }

    /// Number of nodes, this one included.
    pub fn nodes(&self) -> usize {
        1 + match self {
            Self::List(_, _, values) => values.iter().map(Self::nodes).sum(),
            Self::Struct(fields) => fields.iter().map(|(_, value)| value.nodes()).sum(),
            _ => 0,
        }
    }

    /// The node of this number, counted depth first from 0, which is this one.
    pub fn node_mut(&mut self, number: usize) -> Option<&mut Self> {
        if number == 0 {
            return Some(self);
        }
        let mut left = number - 1;
        let children: Box<dyn Iterator<Item = &mut Self>> = match self {
            Self::List(_, _, values) => Box::new(values.iter_mut()),
            Self::Struct(fields) => Box::new(fields.iter_mut().map(|(_, value)| value)),
            _ => return None,
        };
        for child in children {
            let nodes = child.nodes();
            if left < nodes {
                return child.node_mut(left);
            }
            left -= nodes;
        }
        None
    }
}

struct Input<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Input<'_> {
    fn value(&mut self, of: u8, depth: u32) -> Option<Value> {
        let depth = depth.checked_sub(1)?;
        Some(match of {
            // As an element; see `Value::write`.
            TRUE | FALSE => Value::Bool(self.byte()? == TRUE),
            BYTE => Value::Byte(self.byte()?),
            I16 | I32 | I64 => Value::Int(of, self.signed()?),
            DOUBLE => Value::Double(self.take(8)?.try_into().ok()?),
            BINARY => {
                let length = usize::try_from(self.unsigned()?).ok()?;
                Value::Binary(self.take(length)?.to_vec())
            }
            LIST | SET => {
                let head = self.byte()?;
                let length = match head >> 4 {
                    15 => usize::try_from(self.unsigned()?).ok()?,
                    length => usize::from(length),
                };
                // Every element takes a byte at least.
                if length > self.bytes.len() - self.at {
                    return None;
                }
                let values = (0..length).map(|_| self.value(head & 15, depth)).collect::<Option<Vec<_>>>()?;
                Value::List(of, head & 15, values)
            }
            STRUCT => {
                let (mut fields, mut id) = (Vec::new(), 0i16);
                loop {
                    let byte = self.byte()?;
                    if byte == 0 {
                        break Value::Struct(fields);
                    }
                    id = match byte >> 4 {
                        0 => i16::try_from(self.signed()?).ok()?,
                        step => id.checked_add(i16::from(step))?,
                    };
                    let value = match byte & 15 {
                        TRUE => Value::Bool(true),
                        FALSE => Value::Bool(false),
                        of => self.value(of, depth)?,
                    };
                    fields.push((id, value));
                }
            }
            _ => return None,
        })
    }

    fn byte(&mut self) -> Option<u8> {
        self.take(1).map(|bytes| bytes[0])
    }

    fn take(&mut self, length: usize) -> Option<&[u8]> {
        let bytes = self.bytes[self.at..].get(..length)?;
        self.at += length;
        Some(bytes)
    }

    fn unsigned(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 127) << shift;
            if byte & 128 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn signed(&mut self) -> Option<i64> {
        let value = self.unsigned()?;
        Some((value >> 1) as i64 ^ -((value & 1) as i64))
    }
}

fn write_unsigned(mut value: u64, into: &mut Vec<u8>) {
    while value >= 128 {
        into.push(value as u8 | 128);
        value >>= 7;
    }
    into.push(value as u8);
}

fn write_signed(value: i64, into: &mut Vec<u8>) {
    write_unsigned((value << 1 ^ value >> 63) as u64, into);
}
