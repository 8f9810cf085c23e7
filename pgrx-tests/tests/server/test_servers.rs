//! What the servers of the tests are like: they find faults that others survive by luck.

use pg_claims_tests::{Server, Stop, TestDb, own_server};
use postgres::{Client, NoTls};

/// What the environment of the postmaster has for the C library's memory. Asked of the server: the server may read it
/// itself, and in a container even root may not.
fn environment(c: &mut Client) -> Vec<String> {
    let file = "SELECT pg_read_binary_file('/proc/' || split_part(pg_read_file('postmaster.pid'), E'\\n', 1) || '/environ')";
    let bytes: Vec<u8> = c.query_one(file, &[]).unwrap().get(0);
    let text = String::from_utf8_lossy(&bytes);
    text.split('\0').filter(|entry| entry.starts_with("MALLOC")).map(str::to_owned).collect()
}

fn assert_fills_memory(c: &mut Client, which: &str) {
    let environment = environment(c);
    assert!(
        environment.iter().any(|entry| entry == "MALLOC_PERTURB_=85"),
        "{which}: {environment:?}"
    );
}

#[test]
fn servers_of_tests_fill_memory_that_is_freed() {
    assert_fills_memory(&mut TestDb::new().connect(), "the shared server");
    let server = own_server("fills-memory", &[]);
    let connect = || server.config("postgres").connect(NoTls).unwrap();
    assert_fills_memory(&mut connect(), "one of a test's own");
    server.stop(Stop::Fast).unwrap();
    server.start().unwrap();
    assert_fills_memory(&mut connect(), "after a restart");
    server.crash().unwrap();
    server.start().unwrap();
    assert_fills_memory(&mut connect(), "after a crash");
}

fn crash_a_backend(server: &Server) {
    let mut c = server.config("postgres").connect(NoTls).unwrap();
    let pid = pg_claims_tests::backend_pid(&mut c);
    let killed = std::process::Command::new("kill").args(["-SEGV", &pid.to_string()]).status();
    assert!(killed.unwrap().success());
    pg_claims_tests::wait_until("the backend to be gone", || c.simple_query("SELECT 1").is_err());
    // It takes all others along.
    pg_claims_tests::wait_until("the server to have recovered", || {
        server.config("postgres").connect(NoTls).is_ok()
    });
}

#[test]
fn a_server_whose_log_tells_of_a_fault_fails_its_test() {
    let server = own_server("fault-discarded", &[]);
    crash_a_backend(&server);
    let told = format!("{:#}", server.discard().unwrap_err());
    assert!(told.contains("signal 11"), "{told}");

    let dropped = std::panic::catch_unwind(|| {
        let server = own_server("fault-dropped", &[]);
        crash_a_backend(&server);
    });
    let told = dropped.unwrap_err();
    assert!(told.downcast_ref::<String>().unwrap().contains("signal 11"));
    // Either way nothing is left of it, and one without a fault is discarded in peace.
    for name in ["fault-discarded", "fault-dropped"] {
        own_server(name, &[]).discard().unwrap();
    }
}
