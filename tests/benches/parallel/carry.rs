//! How long a link takes to carry as many bytes as an exchange has: plain TCP, each way by itself.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    time::Instant,
};

use crate::{Failure, far::Far};

const CHUNK: usize = 1 << 16;

/// Seconds there and back.
pub fn carry(far: &Far, host: &str, bytes: u64) -> Result<(f64, f64), Failure> {
    let mut other = Other::start(far, host)?;
    let mut stream = other.connect()?;
    stream.write_all(&bytes.to_le_bytes())?;
    let began = Instant::now();
    send(&mut stream, bytes)?;
    stream.read_exact(&mut [0])?;
    let there = began.elapsed().as_secs_f64();
    let began = Instant::now();
    stream.write_all(&[0])?;
    receive(&mut stream, bytes)?;
    Ok((there, began.elapsed().as_secs_f64()))
}

/// The other end: one transfer.
pub fn serve(address: &str) -> Result<(), Failure> {
    let listener = TcpListener::bind(address)?;
    println!("{}", listener.local_addr()?);
    let (mut stream, _) = listener.accept()?;
    stream.set_nodelay(true)?;
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes)?;
    let bytes = u64::from_le_bytes(bytes);
    receive(&mut stream, bytes)?;
    stream.write_all(&[0])?;
    stream.read_exact(&mut [0])?;
    send(&mut stream, bytes)
}

fn send(stream: &mut TcpStream, bytes: u64) -> Result<(), Failure> {
    let chunk = vec![7; CHUNK];
    let mut left = bytes;
    while left > 0 {
        let next = left.min(CHUNK as u64);
        stream.write_all(&chunk[..next as usize])?;
        left -= next;
    }
    Ok(())
}

fn receive(stream: &mut TcpStream, bytes: u64) -> Result<(), Failure> {
    let mut chunk = vec![0; CHUNK];
    let mut left = bytes;
    while left > 0 {
        let next = left.min(CHUNK as u64) as usize;
        stream.read_exact(&mut chunk[..next])?;
        left -= next as u64;
    }
    Ok(())
}

/// The process at the other end; dropped, it is ended.
struct Other {
    child: Child,
}

impl Other {
    fn start(far: &Far, host: &str) -> Result<Self, Failure> {
        let program = std::env::current_exe()?;
        let mut command = if host == crate::far::FAR { far.command(program) } else { Command::new(program) };
        command.args(["carry", &format!("{host}:0")]).stdin(Stdio::null()).stdout(Stdio::piped());
        Ok(Self { child: command.spawn()? })
    }

    fn connect(&mut self) -> Result<TcpStream, Failure> {
        let stdout = self.child.stdout.take().ok_or("the other end has no output")?;
        let mut address = String::new();
        BufReader::new(stdout).read_line(&mut address)?;
        let stream = TcpStream::connect(address.trim()).map_err(|error| format!("{:?}: {error}", address.trim()))?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
