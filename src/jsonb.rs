//! JSON for the server, without the way through a text that the server would parse.

use std::ffi::{CString, c_char};

use pgrx::callconv::{BoxRet, FcInfo};
use pgrx::pg_sys::JsonbIteratorToken as Token;
use pgrx::pg_sys::{JsonbValue, jbvType};
use pgrx::pgrx_sql_entity_graph::metadata::{
    ArgumentError, ReturnsError, ReturnsRef, SqlMappingRef, SqlTranslatable, TypeOrigin,
};
use pgrx::{IntoDatum, pg_sys};
use serde_json::{Number, Value};

/// A value as jsonb.
#[derive(Debug)]
pub struct Jsonb(pub Value);

impl IntoDatum for Jsonb {
    fn into_datum(self) -> Option<pg_sys::Datum> {
        // SAFETY: the server builds a value of its own from the pieces that it is given one by one; those
        // live as long as `self`.
        unsafe {
            let mut state = std::ptr::null_mut();
            let mut scalar;
            let whole = if self.0.is_array() || self.0.is_object() {
                push(&mut state, &self.0, Token::WJB_VALUE)
            } else {
                scalar = scalar_of(&self.0);
                &raw mut scalar
            };
            Some(pg_sys::Datum::from(pg_sys::JsonbValueToJsonb(whole)))
        }
    }

    fn type_oid() -> pg_sys::Oid {
        pg_sys::JSONBOID
    }
}

/// Adds a value to what is being built; `token` says whether a scalar is an element or a key's value.
///
/// # Safety
/// `value` must live until the whole is used.
unsafe fn push(
    state: &mut *mut pg_sys::JsonbParseState,
    value: &Value,
    token: Token::Type,
) -> *mut JsonbValue {
    let none = std::ptr::null_mut();
    // SAFETY: the tokens come in the order that the server asks for.
    unsafe {
        match value {
            Value::Array(elements) => {
                pg_sys::pushJsonbValue(state, Token::WJB_BEGIN_ARRAY, none);
                for element in elements {
                    push(state, element, Token::WJB_ELEM);
                }
                pg_sys::pushJsonbValue(state, Token::WJB_END_ARRAY, none)
            }
            Value::Object(members) => {
                pg_sys::pushJsonbValue(state, Token::WJB_BEGIN_OBJECT, none);
                for (key, member) in members {
                    let mut key = string(key);
                    pg_sys::pushJsonbValue(state, Token::WJB_KEY, &mut key);
                    push(state, member, Token::WJB_VALUE);
                }
                pg_sys::pushJsonbValue(state, Token::WJB_END_OBJECT, none)
            }
            scalar => {
                let mut scalar = scalar_of(scalar);
                pg_sys::pushJsonbValue(state, token, &mut scalar)
            }
        }
    }
}

fn scalar_of(value: &Value) -> JsonbValue {
    let mut scalar = JsonbValue { type_: jbvType::jbvNull, ..JsonbValue::default() };
    match value {
        Value::Bool(truth) => {
            scalar.type_ = jbvType::jbvBool;
            scalar.val.boolean = *truth;
        }
        Value::Number(number) => {
            scalar.type_ = jbvType::jbvNumeric;
            scalar.val.numeric = numeric(number);
        }
        Value::String(text) => scalar = string(text),
        Value::Null | Value::Array(_) | Value::Object(_) => {}
    }
    scalar
}

/// Points to the text, which must live as long as the value is used.
fn string(text: &str) -> JsonbValue {
    let mut value = JsonbValue { type_: jbvType::jbvString, ..JsonbValue::default() };
    value.val.string.len = text.len() as i32;
    value.val.string.val = text.as_ptr().cast::<c_char>().cast_mut();
    value
}

fn numeric(number: &Number) -> pg_sys::Numeric {
    // SAFETY: the server makes a number of its own; serde writes numbers as the server reads them.
    unsafe {
        if let Some(integer) = number.as_i64() {
            return pg_sys::int64_to_numeric(integer);
        }
        let text = CString::new(number.to_string()).unwrap_or_default();
        let arguments = [
            Some(pg_sys::Datum::from(text.as_ptr())),
            Some(pg_sys::Datum::from(pg_sys::Oid::INVALID)),
            Some(pg_sys::Datum::from(-1_i32)),
        ];
        pgrx::direct_function_call_as_datum(pg_sys::numeric_in, &arguments)
            .map_or(std::ptr::null_mut(), |datum| datum.cast_mut_ptr())
    }
}

// SAFETY: into_datum makes a jsonb.
unsafe impl SqlTranslatable for Jsonb {
    const TYPE_IDENT: &'static str = pgrx::pgrx_resolved_type!(Jsonb);
    const TYPE_ORIGIN: TypeOrigin = TypeOrigin::External;
    const ARGUMENT_SQL: Result<SqlMappingRef, ArgumentError> = Ok(SqlMappingRef::literal("jsonb"));
    const RETURN_SQL: Result<ReturnsRef, ReturnsError> =
        Ok(ReturnsRef::One(SqlMappingRef::literal("jsonb")));
}

// SAFETY: the datum is one of the type that the function is declared with.
unsafe impl BoxRet for Jsonb {
    unsafe fn box_into<'fcx>(self, fcinfo: &mut FcInfo<'fcx>) -> pgrx::datum::Datum<'fcx> {
        match self.into_datum() {
            // SAFETY: as above.
            Some(datum) => unsafe { fcinfo.return_raw_datum(datum) },
            None => fcinfo.return_null(),
        }
    }
}
