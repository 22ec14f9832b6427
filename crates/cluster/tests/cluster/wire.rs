//! A wire between a host and etcd, that can be long, and be cut and mended.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

pub struct Wire {
    address: SocketAddr,
    whole: watch::Sender<bool>,
}

impl Wire {
    /// To this address; ends with the test's runtime.
    pub async fn to(target: SocketAddr) -> Self {
        Self::long(target, Duration::ZERO).await
    }

    /// The same, and all that is sent arrives so much later.
    pub async fn long(target: SocketAddr, latency: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (whole, state) = watch::channel(true);
        tokio::spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                let mut state = state.clone();
                tokio::spawn(async move {
                    if !*state.borrow() {
                        return;
                    }
                    let Ok(mut far) = TcpStream::connect(target).await else { return };
                    let ((from_near, to_near), (from_far, to_far)) = (near.split(), far.split());
                    tokio::select! {
                        () = carry(from_near, to_far, latency) => {}
                        () = carry(from_far, to_near, latency) => {}
                        _ = state.wait_for(|whole| !whole) => {}
                    }
                });
            }
        });
        Self { address, whole }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn cut(&self) {
        self.whole.send_replace(false);
    }

    pub fn mend(&self) {
        self.whole.send_replace(true);
    }
}

/// Until one end closes.
async fn carry(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, latency: Duration) {
    let mut bytes = vec![0; 64 << 10];
    while let Ok(read @ 1..) = from.read(&mut bytes).await {
        if !latency.is_zero() {
            tokio::time::sleep(latency).await;
        }
        if to.write_all(&bytes[..read]).await.is_err() {
            return;
        }
    }
}
