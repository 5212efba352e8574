//! Programs of the web: curl, wget and wrk.

use std::io::{BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;

use super::*;
use crate::http::Request;

const LEN: usize = 32 << 20;

/// A server of HTTP/1.1 outside, with a thread for each connection. It ends with the test's process.
pub(super) fn serve(world: &World, body: Vec<u8>, folder: &Path) {
    let (body, folder) = (Arc::new(body), folder.to_owned());
    let listening = world.outside.run(|| TcpListener::bind((OUTSIDE, 80)).expect("its port"));
    thread::spawn(move || {
        for stream in listening.incoming() {
            let (stream, body, folder) = (stream.expect("a client"), body.clone(), folder.clone());
            // A client that goes away in the middle is no fault of the server's.
            thread::spawn(move || answer(stream, &body, &folder));
        }
    });
}

/// Answers the requests of one connection.
/// - `GET /N` is answered with the first N bytes of `body`.
/// - `GET /close/N` is too, with no length but the end of the stream. The client closes its half later.
/// - `PUT /NAME` and `POST /NAME` keep what comes as a file.
fn answer(mut stream: TcpStream, body: &[u8], folder: &Path) -> std::io::Result<()> {
    stream.set_read_timeout(Some(LIMIT))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    while let Some(Request { method, path, len }) = Request::read(&mut reader)? {
        let count: usize = if method == "GET" {
            path.trim_start_matches("close/").parse().unwrap_or(0)
        } else {
            let mut file = fs::File::create(folder.join(&path))?;
            std::io::copy(&mut (&mut reader).take(len), &mut file)?;
            0
        };
        if path.starts_with("close/") {
            stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")?;
            stream.write_all(&body[..count])?;
            stream.shutdown(Shutdown::Write)?;
            reader.read_to_end(&mut Vec::new())?;
            break;
        }
        stream
            .write_all(format!("HTTP/1.1 200 OK\r\nContent-Length: {count}\r\n\r\n").as_bytes())?;
        stream.write_all(&body[..count])?;
    }
    Ok(())
}

#[test]
fn curl_and_wget_get_and_put_every_byte() {
    if !have(&["curl", "wget"]) {
        return;
    }
    let (world, folder) = (World::new(), crate::scratch("programs web"));
    let body = content(LEN);
    fs::write(folder.join("body"), &body).expect("a file");
    serve(&world, body, &folder);
    let at = format!("http://{OUTSIDE}");
    let (rate, slow) = ("8M", 12 << 20);
    let script = format!(
        "cd '{}'; curl -sS -m 100 {at}/{LEN} -o curl-got; wget -q -T 100 {at}/{LEN} -O wget-got; \
         curl -sS -m 100 -T body {at}/curl-put; wget -q -T 100 --post-file=body {at}/wget-put -O /dev/null; \
         curl -sS -m 100 --limit-rate {rate} {at}/{slow} -o slow; \
         curl -sSN -m 100 {at}/close/{LEN} -o closed",
        folder.display()
    );
    guest(&world, &[], &script);
    let wanted = digest(&folder.join("body"));
    for name in ["curl-got", "wget-got", "curl-put", "wget-put", "closed"] {
        assert_eq!(digest(&folder.join(name)), wanted, "{name}");
    }
    let got = fs::read(folder.join("slow")).expect("a file");
    assert!(got == content(slow), "{} of {slow} bytes", got.len());
    fs::remove_dir_all(folder).expect("the folder of the test");
}

#[test]
fn wrk_keeps_a_hundred_connections_busy() {
    if !have(&["wrk"]) {
        return;
    }
    let (world, folder) = (World::new(), crate::scratch("programs wrk"));
    serve(&world, content(1000), &folder);
    let said = guest(&world, &[], &format!("wrk -c 100 -t 2 -d 2s http://{OUTSIDE}/1000"));
    let number = |line: &str| -> u64 {
        let words = line.split_whitespace().next().unwrap_or_default();
        words.parse().unwrap_or_else(|_| panic!("no number: {said}"))
    };
    let requests = said.lines().find(|line| line.contains(" requests in ")).map(number);
    assert!(requests.is_some_and(|requests| requests >= 100), "{said}");
    assert!(!said.contains("Socket errors") && !said.contains("Non-2xx"), "{said}");
}
