//! Every value of a YAML text with its place and its path, to name the field that an error is about.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;

/// A value of the text.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Field {
    /// As in `train.passes`.
    pub path: String,
    /// As it is shown to a user.
    pub value: String,
}

/// A value's line and column, and the value.
type Placed = ((u64, u64), Field);

/// How a value that is not there is shown.
pub(super) const EMPTY: &str = "empty";

/// The last value that begins at the place or before it; none where the text is no YAML, or no
/// section of keys.
pub(super) fn field_at(text: &str, line: u64, column: u64) -> Option<Field> {
    let (_, field) = fields(text)?.into_iter().rfind(|(place, _)| *place <= (line, column))?;
    Some(field)
}

/// Line and column of the value with this path; none where the text has no such key.
pub(super) fn place_of(text: &str, path: &str) -> Option<(u64, u64)> {
    fields(text)?.into_iter().find(|(_, field)| field.path == path).map(|(place, _)| place)
}

/// In the order of the text, what holds others before them.
fn fields(text: &str) -> Option<Vec<Placed>> {
    let root: Spanned<Node> = super::read(text).ok()?;
    let mut fields = Vec::new();
    walk(text, String::new(), &root, &mut fields);
    Some(fields)
}

enum Node {
    /// As it is shown.
    Text(String),
    /// A number, or true or false, as it was understood: `1.0` as `1`.
    Plain(String),
    List(Vec<Spanned<Node>>),
    Section(Vec<(String, Spanned<Node>)>),
}

fn walk(text: &str, path: String, node: &Spanned<Node>, fields: &mut Vec<Placed>) {
    let value: String = match &node.value {
        Node::Text(value) => value.clone(),
        Node::Plain(value) => written(text, node).unwrap_or(value).chars().take(80).collect(),
        Node::List(_) => "a list".to_owned(),
        Node::Section(_) => "a section of keys".to_owned(),
    };
    if !path.is_empty() {
        let place = (node.referenced.line(), node.referenced.column());
        fields.push((place, Field { path: path.clone(), value }));
    }
    match &node.value {
        Node::Text(_) | Node::Plain(_) => {}
        Node::List(items) => {
            items.iter().enumerate().for_each(|(at, item)| walk(text, format!("{path}[{at}]"), item, fields));
        }
        Node::Section(keys) => {
            for (key, value) in keys {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                walk(text, path, value, fields);
            }
        }
    }
}

/// A value as it stands in the text.
fn written<'t>(text: &'t str, node: &Spanned<Node>) -> Option<&'t str> {
    let span = node.defined.span();
    let start = usize::try_from(span.byte_offset()?).ok()?;
    let end = start.checked_add(usize::try_from(span.byte_len()?).ok()?)?;
    text.get(start..end).filter(|written| !written.is_empty() && !written.contains(char::is_control))
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NodeVisitor)
    }
}

struct NodeVisitor;

impl<'de> Visitor<'de> for NodeVisitor {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("YAML")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Node, E> {
        Ok(Node::Plain(value.to_string()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Node, E> {
        Ok(Node::Plain(value.to_string()))
    }

    fn visit_i128<E>(self, value: i128) -> Result<Node, E> {
        Ok(Node::Plain(value.to_string()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Node, E> {
        Ok(Node::Plain(value.to_string()))
    }

    fn visit_u128<E>(self, value: u128) -> Result<Node, E> {
        Ok(Node::Plain(value.to_string()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Node, E> {
        Ok(Node::Plain(value.to_string()))
    }

    fn visit_str<E>(self, value: &str) -> Result<Node, E> {
        let shown: String = value.chars().take(80).collect();
        Ok(Node::Text(format!("{shown:?}")))
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Text(EMPTY.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Node, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Node::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Node, A::Error> {
        let mut keys = Vec::new();
        while let Some(entry) = entries.next_entry()? {
            keys.push(entry);
        }
        Ok(Node::Section(keys))
    }
}
