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

/// The last value that begins at the place or before it; none where the text is no YAML, or no
/// section of keys.
pub(super) fn field_at(text: &str, line: u64, column: u64) -> Option<Field> {
    let root: Spanned<Node> = serde_saphyr::from_str(text).ok()?;
    let mut fields = Vec::new();
    walk(String::new(), &root, &mut fields);
    let (_, field) = fields.into_iter().rfind(|(place, _)| *place <= (line, column))?;
    Some(field)
}

/// Line and column of the value with this path; none where the text has no such key.
pub(super) fn place_of(text: &str, path: &str) -> Option<(u64, u64)> {
    let root: Spanned<Node> = serde_saphyr::from_str(text).ok()?;
    let mut fields = Vec::new();
    walk(String::new(), &root, &mut fields);
    fields.into_iter().find(|(_, field)| field.path == path).map(|(place, _)| place)
}

enum Node {
    Scalar(String),
    List(Vec<Spanned<Node>>),
    Section(Vec<(String, Spanned<Node>)>),
}

fn walk(path: String, node: &Spanned<Node>, fields: &mut Vec<((u64, u64), Field)>) {
    let value = match &node.value {
        Node::Scalar(value) => value.clone(),
        Node::List(_) => "a list".to_owned(),
        Node::Section(_) => "a section of keys".to_owned(),
    };
    if !path.is_empty() {
        let place = (node.referenced.line(), node.referenced.column());
        fields.push((place, Field { path: path.clone(), value }));
    }
    match &node.value {
        Node::Scalar(_) => {}
        Node::List(items) => {
            items.iter().enumerate().for_each(|(at, item)| walk(format!("{path}[{at}]"), item, fields));
        }
        Node::Section(keys) => {
            for (key, value) in keys {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                walk(path, value, fields);
            }
        }
    }
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
        Ok(Node::Scalar(value.to_string()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Node, E> {
        Ok(Node::Scalar(value.to_string()))
    }

    fn visit_i128<E>(self, value: i128) -> Result<Node, E> {
        Ok(Node::Scalar(value.to_string()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Node, E> {
        Ok(Node::Scalar(value.to_string()))
    }

    fn visit_u128<E>(self, value: u128) -> Result<Node, E> {
        Ok(Node::Scalar(value.to_string()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Node, E> {
        Ok(Node::Scalar(value.to_string()))
    }

    fn visit_str<E>(self, value: &str) -> Result<Node, E> {
        let shown: String = value.chars().take(80).collect();
        Ok(Node::Scalar(format!("{shown:?}")))
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Scalar("empty".to_owned()))
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
