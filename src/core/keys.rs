//! Reading a list of keys out of whatever a json column holds.

use serde_json::Value;

/// The keys as a list of strings; what is no list as a string, for a person to see. `null` stays.
pub fn read(json: &str) -> Value {
    match serde_json::from_str(json) {
        Ok(Value::Null) => Value::Null,
        Ok(Value::Array(keys)) => Value::Array(keys.into_iter().map(key).collect()),
        Ok(_) => printable(json),
        // JSON to PostgreSQL, but not to us: half a surrogate pair, or a nesting too deep.
        Err(_) => printable(json),
    }
}

fn key(value: Value) -> Value {
    match value {
        Value::Null => Value::Null,
        Value::String(text) => printable(&text),
        other => printable(&other.to_string()),
    }
}

/// PostgreSQL's text cannot hold the character 0.
fn printable(text: &str) -> Value {
    Value::String(text.replace('\0', "\u{fffd}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn whatever_json_is_can_be_read() {
        for (text, expected) in [
            (r#"["A", 12]"#, json!(["A", "12"])),
            ("null", json!(null)),
            ("[null]", json!([null])),
            (r#"["\u0000"]"#, json!(["\u{fffd}"])),
            ("[1e999999]", json!(["1e+999999"])),
            (r#"["\ud800"]"#, json!(r#"["\ud800"]"#)),
            (r#"{"on": "A"}"#, json!(r#"{"on": "A"}"#)),
            (r#"[{"on": "A"}]"#, json!([r#"{"on":"A"}"#])),
        ] {
            assert_eq!(read(text), expected, "{text}");
        }
    }
}
