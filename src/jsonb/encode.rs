//! Writing what serde tells in the server's form.

use std::borrow::Cow;
use std::ffi::CString;
use std::fmt::{self, Display, Write as _};
use std::iter;

use pgrx::pg_sys;
use serde::ser::{self, Error as _, Serialize, Serializer};
use serde_json::{Error, Result};

use super::layout::{
    IS_ARRAY, IS_CONTAINER, IS_FALSE, IS_NULL, IS_NUMERIC, IS_OBJECT, IS_SCALAR, IS_STRING,
    IS_TRUE, Node, assemble, head,
};

/// How serde tells a number of any precision.
const NUMBER: &str = "$serde_json::private::Number";

/// The name of what has its bytes from the server: an object or array as it is.
pub const STORED: &str = "$pg_claims::jsonb";

/// The value's bytes.
pub fn encode<T: Serialize + ?Sized>(value: &T) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(1024);
    let node = value.serialize(Encoder::new(&mut bytes))?;
    if node.kind == IS_CONTAINER {
        return Ok(bytes);
    }
    assemble(&mut bytes, 0, IS_ARRAY | IS_SCALAR, iter::empty(), iter::once(node))?;
    Ok(bytes)
}

/// Takes text without a look at what it takes it for: the characters of a time come one by one.
struct Text<'b>(&'b mut Vec<u8>);

impl fmt::Write for Text<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.extend_from_slice(text.as_bytes());
        Ok(())
    }

    fn write_char(&mut self, character: char) -> fmt::Result {
        match u8::try_from(character) {
            Ok(byte) if byte.is_ascii() => self.0.push(byte),
            _ => self.write_str(character.encode_utf8(&mut [0; 4]))?,
        }
        Ok(())
    }
}

/// Writes one value to the end of `bytes`.
struct Encoder<'b> {
    bytes: &'b mut Vec<u8>,
    /// Whether the value is one that the server has made.
    is_stored: bool,
}

impl<'b> Encoder<'b> {
    fn new(bytes: &'b mut Vec<u8>) -> Self {
        Self { bytes, is_stored: false }
    }

    fn add(self, kind: u32, bytes: &[u8]) -> Node {
        let begin = self.bytes.len();
        self.bytes.extend_from_slice(bytes);
        Node { kind, begin, end: self.bytes.len() }
    }

    /// # Safety
    /// `number` must be one of the server's.
    unsafe fn add_numeric(self, number: pg_sys::Numeric) -> Node {
        let number = number.cast::<pg_sys::varlena>();
        // SAFETY: as promised; the server makes numbers with a length in front.
        unsafe {
            let length = pgrx::varsize_any(number);
            let node = self.add(IS_NUMERIC, std::slice::from_raw_parts(number.cast(), length));
            pg_sys::pfree(number.cast());
            node
        }
    }

    /// A number as serde writes it, which the server reads.
    fn add_number(self, text: &str) -> Result<Node> {
        let text = CString::new(text).map_err(Error::custom)?;
        let arguments = [
            Some(pg_sys::Datum::from(text.as_ptr())),
            Some(pg_sys::Datum::from(pg_sys::Oid::INVALID)),
            Some(pg_sys::Datum::from(-1_i32)),
        ];
        // SAFETY: a function of the server's, which makes a number of its own.
        unsafe {
            let number = pgrx::direct_function_call_as_datum(pg_sys::numeric_in, &arguments)
                .ok_or_else(|| Error::custom("no number"))?;
            Ok(self.add_numeric(number.cast_mut_ptr()))
        }
    }
}

impl<'b> Serializer for Encoder<'b> {
    type Ok = Node;
    type Error = Error;
    type SerializeSeq = List<'b>;
    type SerializeTuple = ser::Impossible<Node, Error>;
    type SerializeTupleStruct = ser::Impossible<Node, Error>;
    type SerializeTupleVariant = ser::Impossible<Node, Error>;
    type SerializeMap = Members<'b>;
    type SerializeStruct = Members<'b>;
    type SerializeStructVariant = ser::Impossible<Node, Error>;

    fn serialize_bool(self, value: bool) -> Result<Node> {
        Ok(self.add(if value { IS_TRUE } else { IS_FALSE }, &[]))
    }

    fn serialize_i8(self, value: i8) -> Result<Node> {
        self.serialize_i64(value.into())
    }

    fn serialize_i16(self, value: i16) -> Result<Node> {
        self.serialize_i64(value.into())
    }

    fn serialize_i32(self, value: i32) -> Result<Node> {
        self.serialize_i64(value.into())
    }

    fn serialize_i64(self, value: i64) -> Result<Node> {
        // SAFETY: the server makes a number of its own.
        unsafe { Ok(self.add_numeric(pg_sys::int64_to_numeric(value))) }
    }

    fn serialize_u8(self, value: u8) -> Result<Node> {
        self.serialize_i64(value.into())
    }

    fn serialize_u16(self, value: u16) -> Result<Node> {
        self.serialize_i64(value.into())
    }

    fn serialize_u32(self, value: u32) -> Result<Node> {
        self.serialize_i64(value.into())
    }

    fn serialize_u64(self, value: u64) -> Result<Node> {
        self.add_number(&value.to_string())
    }

    fn serialize_f32(self, value: f32) -> Result<Node> {
        self.serialize_f64(value.into())
    }

    fn serialize_f64(self, value: f64) -> Result<Node> {
        match serde_json::Number::from_f64(value) {
            Some(number) => self.add_number(number.as_str()),
            None => self.serialize_unit(),
        }
    }

    fn serialize_char(self, value: char) -> Result<Node> {
        self.serialize_str(value.encode_utf8(&mut [0; 4]))
    }

    fn serialize_str(self, value: &str) -> Result<Node> {
        Ok(self.add(IS_STRING, value.as_bytes()))
    }

    fn collect_str<T: Display + ?Sized>(self, value: &T) -> Result<Node> {
        let begin = self.bytes.len();
        write!(Text(self.bytes), "{value}").map_err(Error::custom)?;
        Ok(Node { kind: IS_STRING, begin, end: self.bytes.len() })
    }

    fn serialize_bytes(self, value: &[u8]) -> Result<Node> {
        if !self.is_stored {
            return value.serialize(self);
        }
        if head(value).is_none_or(|head| head & IS_SCALAR != 0) {
            return Err(unused("a stored value that is no container"));
        }
        Ok(self.add(IS_CONTAINER, value))
    }

    fn serialize_none(self) -> Result<Node> {
        self.serialize_unit()
    }

    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<Node> {
        value.serialize(self)
    }

    fn serialize_unit(self) -> Result<Node> {
        Ok(self.add(IS_NULL, &[]))
    }

    fn serialize_unit_struct(self, _name: &'static str) -> Result<Node> {
        self.serialize_unit()
    }

    fn serialize_unit_variant(
        self,
        _name: &'static str,
        _index: u32,
        variant: &'static str,
    ) -> Result<Node> {
        self.serialize_str(variant)
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(
        self,
        name: &'static str,
        value: &T,
    ) -> Result<Node> {
        value.serialize(Self { is_stored: name == STORED, ..self })
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _name: &'static str,
        _index: u32,
        variant: &'static str,
        value: &T,
    ) -> Result<Node> {
        let mut members = Members::new(self);
        let value = value.serialize(Encoder::new(members.bytes))?;
        members.put(variant.into(), value);
        members.finish()
    }

    fn serialize_seq(self, _length: Option<usize>) -> Result<List<'b>> {
        Ok(List { begin: self.bytes.len(), bytes: self.bytes, nodes: Vec::new() })
    }

    fn serialize_tuple(self, _length: usize) -> Result<Self::SerializeTuple> {
        Err(unused("a tuple"))
    }

    fn serialize_tuple_struct(
        self,
        name: &'static str,
        _length: usize,
    ) -> Result<Self::SerializeTupleStruct> {
        Err(unused(name))
    }

    fn serialize_tuple_variant(
        self,
        name: &'static str,
        _index: u32,
        _variant: &'static str,
        _length: usize,
    ) -> Result<Self::SerializeTupleVariant> {
        Err(unused(name))
    }

    fn serialize_map(self, _length: Option<usize>) -> Result<Members<'b>> {
        Ok(Members::new(self))
    }

    fn serialize_struct(self, name: &'static str, _length: usize) -> Result<Members<'b>> {
        Ok(Members { is_number: name == NUMBER, ..Members::new(self) })
    }

    fn serialize_struct_variant(
        self,
        name: &'static str,
        _index: u32,
        _variant: &'static str,
        _length: usize,
    ) -> Result<Self::SerializeStructVariant> {
        Err(unused(name))
    }
}

/// The error for what no answer is made of.
fn unused(name: &str) -> Error {
    Error::custom(format!("{name} has a form that is not used in answers"))
}

/// The elements of an array, so far.
struct List<'b> {
    bytes: &'b mut Vec<u8>,
    begin: usize,
    nodes: Vec<Node>,
}

impl ser::SerializeSeq for List<'_> {
    type Ok = Node;
    type Error = Error;

    fn serialize_element<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<()> {
        self.nodes.push(value.serialize(Encoder::new(self.bytes))?);
        Ok(())
    }

    fn end(self) -> Result<Node> {
        assemble(self.bytes, self.begin, IS_ARRAY, iter::empty(), self.nodes.into_iter())
    }
}

/// The members of an object, so far.
struct Members<'b> {
    bytes: &'b mut Vec<u8>,
    begin: usize,
    /// Keys and values, in the order in which they will be stored.
    members: Vec<(Cow<'static, str>, Node)>,
    /// A key whose value has not come yet.
    key: Option<String>,
    /// Whether it is no object, but how serde tells a number.
    is_number: bool,
}

impl<'b> Members<'b> {
    fn new(encoder: Encoder<'b>) -> Self {
        Self {
            begin: encoder.bytes.len(),
            bytes: encoder.bytes,
            members: Vec::with_capacity(12),
            key: None,
            is_number: false,
        }
    }

    /// Of members of one name the last one counts.
    fn put(&mut self, key: Cow<'static, str>, value: Node) {
        let place = |other: &str| other.len().cmp(&key.len()).then_with(|| other.cmp(&key));
        match self.members.binary_search_by(|(other, _)| place(other)) {
            Ok(at) => self.members[at].1 = value,
            Err(at) => self.members.insert(at, (key, value)),
        }
    }

    fn finish(self) -> Result<Node> {
        if self.is_number {
            return self.number();
        }
        let keys = self.members.iter().map(|(key, _)| key.as_ref());
        let values = self.members.iter().map(|(_, value)| *value);
        assemble(self.bytes, self.begin, IS_OBJECT, keys, values)
    }

    fn number(self) -> Result<Node> {
        let value = self.members.first().map(|(_, value)| *value);
        let Node { begin, end, .. } = value.ok_or_else(|| Error::custom("no number"))?;
        let text = String::from_utf8_lossy(&self.bytes[begin..end]).into_owned();
        self.bytes.truncate(self.begin);
        let encoder = Encoder::new(self.bytes);
        match text.parse() {
            Ok(integer) => encoder.serialize_i64(integer),
            Err(_) => encoder.add_number(&text),
        }
    }
}

impl ser::SerializeMap for Members<'_> {
    type Ok = Node;
    type Error = Error;

    fn serialize_key<T: Serialize + ?Sized>(&mut self, key: &T) -> Result<()> {
        let Node { kind, begin, end } = key.serialize(Encoder::new(self.bytes))?;
        if kind != IS_STRING {
            return Err(Error::custom("a key must be a string"));
        }
        self.key = Some(String::from_utf8_lossy(&self.bytes[begin..end]).into_owned());
        self.bytes.truncate(begin);
        Ok(())
    }

    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<()> {
        let key = self.key.take().ok_or_else(|| Error::custom("a value needs a key"))?;
        let value = value.serialize(Encoder::new(self.bytes))?;
        self.put(key.into(), value);
        Ok(())
    }

    fn end(self) -> Result<Node> {
        self.finish()
    }
}

impl ser::SerializeStruct for Members<'_> {
    type Ok = Node;
    type Error = Error;

    fn serialize_field<T: Serialize + ?Sized>(
        &mut self,
        key: &'static str,
        value: &T,
    ) -> Result<()> {
        let value = value.serialize(Encoder::new(self.bytes))?;
        self.put(key.into(), value);
        Ok(())
    }

    fn end(self) -> Result<Node> {
        self.finish()
    }
}
