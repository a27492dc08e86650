//! Mutual TLS between workers: each shows a certificate of their own authority and asks for one.

use std::path::PathBuf;

use retort_core::{Code, Error, Result};
use tonic::transport::{Certificate, ClientTlsConfig, Identity, ServerTlsConfig};

/// Largest certificate or key that is read, bytes.
const MAX_BYTES: u64 = 1 << 20;

/// Flags; all three or none.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct TlsArgs {
    /// Authority that signed the certificates of all workers that talk to each other, PEM
    #[arg(long, env = "RETORT_TLS_CA", value_name = "FILE", requires_all = ["tls_cert", "tls_key"])]
    pub tls_ca: Option<PathBuf>,
    /// This process's certificate, PEM; it names the host at which the others reach it
    #[arg(long, env = "RETORT_TLS_CERT", value_name = "FILE", requires_all = ["tls_ca", "tls_key"])]
    pub tls_cert: Option<PathBuf>,
    /// Its private key, PEM
    #[arg(long, env = "RETORT_TLS_KEY", value_name = "FILE", requires_all = ["tls_ca", "tls_cert"])]
    pub tls_key: Option<PathBuf>,
}

/// What the flags name, read.
#[derive(Clone)]
pub struct Tls {
    authority: Certificate,
    identity: Identity,
}

impl TlsArgs {
    /// `None` without flags; [`Code::RequestInvalid`] for a file that is no PEM.
    pub fn read(&self) -> Result<Option<Tls>> {
        let (Some(authority), Some(certificate), Some(key)) = (&self.tls_ca, &self.tls_cert, &self.tls_key) else {
            return Ok(None);
        };
        // Two cryptographic libraries are linked (the broker brings another), so one is named; the first
        // that was named stays.
        let _ = rustls::crypto::ring::default_provider().install_default();
        Ok(Some(Tls {
            authority: Certificate::from_pem(pem(authority)?),
            identity: Identity::from_pem(pem(certificate)?, pem(key)?),
        }))
    }
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tls")
    }
}

impl Tls {
    pub(super) fn server(&self) -> ServerTlsConfig {
        ServerTlsConfig::new().identity(self.identity.clone()).client_ca_root(self.authority.clone())
    }

    pub(super) fn client(&self, host: &str) -> ClientTlsConfig {
        let name = host.trim_start_matches('[').trim_end_matches(']');
        ClientTlsConfig::new().identity(self.identity.clone()).ca_certificate(self.authority.clone()).domain_name(name)
    }
}

fn pem(path: &PathBuf) -> Result<Vec<u8>> {
    let size = std::fs::metadata(path).map_err(|error| Error::io(path, error))?.len();
    let bytes =
        if size > MAX_BYTES { Vec::new() } else { std::fs::read(path).map_err(|error| Error::io(path, error))? };
    if !bytes.starts_with(b"-----BEGIN ") && !bytes.windows(12).any(|at| at == b"\n-----BEGIN ") {
        return Err(Error::new(
            Code::RequestInvalid,
            format!("{} is no PEM file: it has no line that starts with \"-----BEGIN \"", path.display()),
        ));
    }
    Ok(bytes)
}
