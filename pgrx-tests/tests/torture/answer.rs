//! The server's answer to a statement: rows, an error, or a lost connection.

use postgres::{Client, SimpleQueryMessage};

pub enum Answer {
    /// The first column of each row.
    Rows(Vec<Option<String>>),
    /// The server's error, after which the connection goes on.
    Refused { code: String, text: String },
    /// The connection is gone; whether the statement took effect is unknown.
    Lost { code: Option<String>, text: String },
}

/// Runs a statement, or several as one.
pub fn ask(client: &mut Client, sql: &str) -> Answer {
    match client.simple_query(sql) {
        Ok(messages) => Answer::Rows(
            messages
                .iter()
                .filter_map(|message| match message {
                    SimpleQueryMessage::Row(row) => Some(row.get(0).map(str::to_owned)),
                    _ => None,
                })
                .collect(),
        ),
        Err(error) => match error.as_db_error() {
            Some(told) => {
                let code = told.code().code().to_owned();
                let parts = [Some(told.message()), told.detail(), told.where_()];
                let text = parts.into_iter().flatten().collect::<Vec<_>>().join("; ");
                if matches!(told.severity(), "FATAL" | "PANIC") || client.is_closed() {
                    Answer::Lost { code: Some(code), text }
                } else {
                    Answer::Refused { code, text }
                }
            }
            None => Answer::Lost { code: None, text: error.to_string() },
        },
    }
}

impl std::fmt::Display for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Rows(rows) => {
                let rows: Vec<&str> =
                    rows.iter().map(|row| row.as_deref().unwrap_or("NULL")).collect();
                let text: String = rows.join(" | ").chars().take(600).collect();
                write!(f, "{}", if text.is_empty() { "done" } else { &text })
            }
            Self::Refused { code, text } => write!(f, "ERROR {code}: {text}"),
            Self::Lost { code, text } => {
                write!(f, "LOST {}: {text}", code.as_deref().unwrap_or("connection"))
            }
        }
    }
}
