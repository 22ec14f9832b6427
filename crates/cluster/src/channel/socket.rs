//! One connection's socket: its options, and its end when the peer is removed.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use nix::sys::socket::{Shutdown, setsockopt, shutdown, sockopt};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{oneshot, watch};

use super::DEAD_AFTER;
use crate::identity::{HostId, Members};

/// No waiting for more to send; an idle peer that is gone is found by probes, a busy one by what it does not acknowledge.
pub(super) fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let dead_after_ms = u32::try_from(DEAD_AFTER.as_millis()).unwrap_or(u32::MAX);
    setsockopt(stream, sockopt::TcpUserTimeout, &dead_after_ms)?;
    setsockopt(stream, sockopt::KeepAlive, &true)?;
    setsockopt(stream, sockopt::TcpKeepIdle, &2)?;
    setsockopt(stream, sockopt::TcpKeepInterval, &1)?;
    setsockopt(stream, sockopt::TcpKeepCount, &3)?;
    Ok(())
}

/// Closes the connection as soon as the peer is no member any more, whoever uses it then; for as long as the returned
/// [`Bound`] lives.
pub(super) fn bind_to_membership(
    stream: &TcpStream,
    host: HostId,
    mut members: watch::Receiver<Arc<Members>>,
) -> io::Result<Bound> {
    let socket: OwnedFd = stream.as_fd().try_clone_to_owned()?;
    let (ended, bound) = oneshot::channel::<()>();
    let mut ended = ended;
    tokio::spawn(async move {
        tokio::select! {
            // When the directory is closed (an error here), nobody can say who belongs.
            _ = members.wait_for(|members| members.get(host).is_none()) => {
                tracing::info!(%host, "a connection ends: its host was removed from the cluster");
                // Not connected any more is as good.
                let _ = shutdown(socket.as_raw_fd(), Shutdown::Both);
            }
            () = ended.closed() => {}
        }
    });
    Ok(Bound(bound))
}

/// Keeps the watch over a connection.
#[derive(Debug)]
pub(super) struct Bound(#[expect(dead_code, reason = "its end is what counts")] oneshot::Receiver<()>);

/// A stream with what keeps the watch over it.
#[derive(Debug)]
pub(super) struct Guarded<S> {
    stream: S,
    _bound: Bound,
}

impl<S> Guarded<S> {
    pub fn new(stream: S, bound: Bound) -> Self {
        Self { stream, _bound: bound }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Guarded<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Guarded<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
