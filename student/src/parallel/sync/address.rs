//! Where a worker listens for those that train with it, and what it is reached at.

use std::net::SocketAddr;

use retort_core::{Code, Error, Result};
use retort_worker::peer::{Tls, TlsArgs, check_private, host_and_port};

/// Flags of a worker that may train a model together with others.
#[derive(Clone, Debug, clap::Args)]
pub struct PeerArgs {
    /// Where this worker listens for those that train with it, while it leads
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:0")]
    pub listen: String,
    /// What the others dial, where that differs from --listen; port 0 is the port that --listen has got
    #[arg(long, env = "RETORT_ADVERTISE", value_name = "HOST:PORT")]
    pub advertise: Option<String>,
    /// Train with workers on other machines without TLS: whoever reaches the port can read and change the work
    #[arg(long, env = "RETORT_TRAIN_PLAINTEXT")]
    pub plaintext: bool,
    #[command(flatten)]
    pub tls: TlsArgs,
}

/// What the flags say, checked.
#[derive(Clone, Debug)]
pub struct Peers {
    pub(super) listen: String,
    advertise: Option<String>,
    pub(super) tls: Option<Tls>,
    plaintext: bool,
}

impl Default for Peers {
    /// This machine alone, on a port that is free.
    fn default() -> Self {
        Self { listen: "127.0.0.1:0".to_owned(), advertise: None, tls: None, plaintext: false }
    }
}

impl PeerArgs {
    /// [`Code::RequestInvalid`] for an address that is none, that nobody can dial, or that is another
    /// machine's without TLS.
    pub fn read(&self) -> Result<Peers> {
        let (host, _) = host_and_port(&self.listen)?;
        if let Some(advertise) = &self.advertise {
            host_and_port(advertise)?;
        } else if ["0.0.0.0", "[::]"].contains(&host) {
            return Err(Error::new(
                Code::RequestInvalid,
                format!("--listen {} is no address to dial: say with --advertise HOST:PORT what is", self.listen),
            ));
        }
        let tls = self.tls.read()?;
        let addresses = std::iter::once(self.listen.as_str()).chain(self.advertise.as_deref());
        check_private(addresses, tls.as_ref(), self.plaintext)?;
        Ok(Peers { listen: self.listen.clone(), advertise: self.advertise.clone(), tls, plaintext: self.plaintext })
    }
}

impl Peers {
    /// What others dial, once this worker listens at `bound`.
    pub(super) fn advertised(&self, bound: SocketAddr) -> Result<String> {
        let named = self.advertise.as_ref().unwrap_or(&self.listen);
        let (host, port) = host_and_port(named)?;
        Ok(format!("{host}:{}", if port == 0 { bound.port() } else { port }))
    }

    /// Whether what is said to `address` stays private, or need not.
    pub(super) fn check(&self, address: &str) -> Result<()> {
        host_and_port(address)?;
        check_private([address], self.tls.as_ref(), self.plaintext)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(listen: &str, advertise: Option<&str>) -> PeerArgs {
        PeerArgs {
            listen: listen.to_owned(),
            advertise: advertise.map(str::to_owned),
            plaintext: false,
            tls: TlsArgs::default(),
        }
    }

    #[test]
    fn what_others_dial_has_the_port_that_was_bound() {
        let bound = "127.0.0.1:4711".parse().unwrap();
        let advertised = |listen: &str, advertise: Option<&str>| {
            PeerArgs { plaintext: true, ..args(listen, advertise) }.read().unwrap().advertised(bound).unwrap()
        };
        assert_eq!(Peers::default().advertised(bound).unwrap(), "127.0.0.1:4711");
        assert_eq!(advertised("localhost:0", None), "localhost:4711");
        assert_eq!(advertised("0.0.0.0:0", Some("10.0.0.7:0")), "10.0.0.7:4711");
        assert_eq!(advertised("0.0.0.0:7480", Some("trainer-0.pool:7490")), "trainer-0.pool:7490");
    }

    #[test]
    fn addresses_that_nobody_can_dial_or_everybody_can_read_are_refused() {
        let refused = |args: PeerArgs| args.read().unwrap_err().message;
        assert!(refused(args("nowhere", None)).contains("HOST:PORT"));
        assert!(refused(args("0.0.0.0:0", None)).contains("--advertise"));
        assert!(refused(args("10.0.0.7:0", None)).contains("--tls-ca"));
        assert!(refused(args("127.0.0.1:0", Some("10.0.0.7:1"))).contains("--plaintext"));
        assert!(Peers::default().check("10.0.0.7:1").unwrap_err().message.contains("--tls-ca"));
        Peers::default().check("127.0.0.1:1").unwrap();
        PeerArgs { plaintext: true, ..args("10.0.0.7:0", None) }.read().unwrap().check("10.0.0.8:1").unwrap();
    }
}
