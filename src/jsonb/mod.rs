//! JSON for the server, without the way through a text that the server would parse, or through a tree.

mod encode;
mod layout;

use pgrx::callconv::{Arg, ArgAbi, BoxRet, FcInfo};
use pgrx::pgrx_sql_entity_graph::metadata::{
    ArgumentError, ReturnsError, ReturnsRef, SqlMappingRef, SqlTranslatable, TypeOrigin,
};
use pgrx::{FromDatum, IntoDatum, pg_sys};
use serde::{Serialize, Serializer};

/// A value as the server stores jsonb, but for the length in front of it.
#[derive(Debug)]
pub struct Jsonb(Vec<u8>);

impl Jsonb {
    /// What serde makes of a value.
    ///
    /// # Errors
    /// If it is too large for the server, or serde cannot tell it as JSON.
    pub fn of<T: Serialize + ?Sized>(value: &T) -> serde_json::Result<Self> {
        encode::encode(value).map(Self)
    }

    /// How many bytes it takes.
    pub fn size(&self) -> usize {
        self.0.len()
    }

    /// Whether it is an object.
    pub fn is_object(&self) -> bool {
        layout::is_object(&self.0)
    }
}

/// As part of another [`Jsonb`], and of nothing else.
impl Serialize for Jsonb {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_newtype_struct(encode::STORED, &Stored(&self.0))
    }
}

struct Stored<'a>(&'a [u8]);

impl Serialize for Stored<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(self.0)
    }
}

impl FromDatum for Jsonb {
    unsafe fn from_polymorphic_datum(
        datum: pg_sys::Datum,
        is_null: bool,
        _type: pg_sys::Oid,
    ) -> Option<Self> {
        if is_null {
            return None;
        }
        // SAFETY: the caller's datum is a jsonb, which is read while it is there.
        unsafe {
            let given = datum.cast_mut_ptr();
            let whole = pg_sys::pg_detoast_datum_packed(given);
            let value = Self(pgrx::varlena_to_byte_slice(whole).to_vec());
            if whole != given {
                pg_sys::pfree(whole.cast());
            }
            Some(value)
        }
    }
}

impl IntoDatum for Jsonb {
    fn into_datum(self) -> Option<pg_sys::Datum> {
        let length = pg_sys::VARHDRSZ + self.0.len();
        // SAFETY: the server's memory is as long as what is written to it.
        unsafe {
            let datum = pg_sys::palloc(length).cast::<pg_sys::varlena>();
            // Not longer than `encode` allows.
            pgrx::set_varsize_4b(datum, length as i32);
            pgrx::vardata_any(datum)
                .cast::<u8>()
                .cast_mut()
                .copy_from_nonoverlapping(self.0.as_ptr(), self.0.len());
            Some(pg_sys::Datum::from(datum))
        }
    }

    fn type_oid() -> pg_sys::Oid {
        pg_sys::JSONBOID
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

// SAFETY: from_datum reads a jsonb.
unsafe impl<'fcx> ArgAbi<'fcx> for Jsonb {
    unsafe fn unbox_arg_unchecked(arg: Arg<'_, 'fcx>) -> Self {
        // SAFETY: as the caller promises.
        let given = unsafe { arg.unbox_arg_using_from_datum() };
        given.unwrap_or_else(|| panic!("a NULL where none can be"))
    }
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
