//! Plans of the server, and what their statements did.

use anyhow::{Context, Result};
use postgres::Client;
use serde_json::Value;

/// Explains a statement; the options are those of EXPLAIN.
pub fn explain(client: &mut Client, options: &str, sql: &str) -> Result<Value> {
    let plans: Value =
        client.query_one(&format!("EXPLAIN ({options}, FORMAT JSON) {sql}"), &[])?.get(0);
    plans.get(0).cloned().context("EXPLAIN told no plan")
}

/// How many bytes of WAL a script's statements write, apart from their commits: the median of many times,
/// for the first time that a page is written after a checkpoint it is there as a whole.
pub fn wal(client: &mut Client, script: &str) -> Result<f64> {
    let mut all = Vec::new();
    for n in 1..=101 {
        let mut bytes = 0.0;
        for line in script.lines().filter(|line| !line.starts_with('\\')) {
            let sql = line.replace(":n", &n.to_string()).replace(":c", &n.to_string());
            bytes += wal_of(&explain(client, "ANALYZE, WAL", &sql)?["Plan"])?;
        }
        all.push(bytes);
    }
    all.sort_by(f64::total_cmp);
    Ok(all[all.len() / 2])
}

/// What a plan wrote. Its topmost node counts what ran within it; a data-modifying CTE that nothing reads
/// runs after that, and counts for itself.
fn wal_of(plan: &Value) -> Result<f64> {
    let bytes = |node: &Value| node["WAL Bytes"].as_f64().context("EXPLAIN told no WAL");
    let text = plan.to_string();
    let mut sum = bytes(plan)?;
    for part in parts(plan) {
        let cte = part["Subplan Name"].as_str().and_then(|name| name.strip_prefix("CTE "));
        if cte.is_some_and(|cte| !text.contains(&format!("\"CTE Name\":\"{cte}\""))) {
            sum += bytes(part)?;
        }
    }
    Ok(sum)
}

/// How many pages a plan that was run has touched, in memory or not.
pub fn buffers(plan: &Value) -> Result<f64> {
    let pages = |key: &str| plan[key].as_f64().context("EXPLAIN told no buffers");
    Ok(pages("Shared Hit Blocks")? + pages("Shared Read Blocks")?)
}

/// How many scans of tables read them, or an index of theirs, whole.
pub fn whole_scans(plan: &Value) -> usize {
    // A bitmap's table is read where its indexes say, which are nodes of their own.
    let is_scan = (plan.get("Relation Name").is_some() || plan.get("Index Name").is_some())
        && plan["Node Type"] != "Bitmap Heap Scan";
    usize::from(is_scan && plan.get("Index Cond").is_none())
        + parts(plan).map(whole_scans).sum::<usize>()
}

fn parts(plan: &Value) -> impl Iterator<Item = &Value> {
    plan["Plans"].as_array().into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn append(parts: &[Value]) -> Value {
        json!({"Node Type": "Append", "Plans": parts})
    }

    #[test]
    fn a_lookup_by_an_index_reads_nothing_whole() {
        let by_index = json!({"Node Type": "Index Scan", "Relation Name": "t", "Index Name": "i",
                              "Index Cond": "(a = 1)"});
        let bitmap = json!({"Node Type": "Bitmap Heap Scan", "Relation Name": "t", "Recheck Cond": "(a = 1)",
                            "Plans": [{"Node Type": "Bitmap Index Scan", "Index Name": "i", "Index Cond": "(a = 1)"}]});
        let constant = json!({"Node Type": "Result", "One-Time Filter": "false"});
        assert_eq!(whole_scans(&append(&[by_index, bitmap, constant])), 0);
    }

    #[test]
    fn a_table_or_an_index_may_be_read_whole() {
        let table = json!({"Node Type": "Seq Scan", "Relation Name": "t", "Filter": "(a = 1)"});
        let index =
            json!({"Node Type": "Index Only Scan", "Relation Name": "t", "Index Name": "i"});
        let bitmap = json!({"Node Type": "Bitmap Heap Scan", "Relation Name": "t",
                            "Plans": [{"Node Type": "Bitmap Index Scan", "Index Name": "i"}]});
        assert_eq!(whole_scans(&append(&[table, index, bitmap])), 3);
    }

    #[test]
    fn wal_of_a_part_that_nothing_reads_is_added() {
        let read = json!({"Node Type": "ModifyTable", "Subplan Name": "CTE h", "WAL Bytes": 10});
        let unread = json!({"Node Type": "ModifyTable", "Subplan Name": "CTE e", "WAL Bytes": 5});
        let reader = json!({"Node Type": "CTE Scan", "CTE Name": "h", "WAL Bytes": 10});
        let plan =
            json!({"Node Type": "ModifyTable", "WAL Bytes": 30, "Plans": [read, unread, reader]});
        assert_eq!(wal_of(&plan).unwrap(), 35.0);
    }

    #[test]
    fn buffers_are_counted_in_memory_or_not() {
        let plan =
            json!({"Shared Hit Blocks": 7, "Shared Read Blocks": 2, "Shared Dirtied Blocks": 1});
        assert_eq!(buffers(&plan).unwrap(), 9.0);
    }
}
