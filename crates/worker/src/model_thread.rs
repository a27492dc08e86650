use std::panic::{AssertUnwindSafe, catch_unwind};

use retort_core::{Error, Result};
use tokio::sync::{mpsc, oneshot};

type Work<T> = Box<dyn FnOnce(&mut T) + Send>;

/// One operating-system thread that owns a model (or whatever `T` is) and does one piece of work at
/// a time. The async side waits for answers without blocking.
///
/// A panic inside a piece of work (libtorch out of memory, say) becomes an error of that piece, and
/// `T` is made anew for the next. Dropping the handle ends the thread after its current piece; the
/// process may exit meanwhile.
#[derive(Debug)]
pub struct ModelThread<T> {
    work: mpsc::Sender<Work<T>>,
}

impl<T: 'static> ModelThread<T> {
    /// `make` runs on the thread, so `T` need not be `Send`.
    pub fn spawn(name: &str, make: impl Fn() -> T + Send + 'static) -> Result<Self> {
        let (work, mut queue) = mpsc::channel::<Work<T>>(1);
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                let mut owned = make();
                while let Some(piece) = queue.blocking_recv() {
                    if catch_unwind(AssertUnwindSafe(|| piece(&mut owned))).is_err() {
                        owned = make();
                    }
                }
            })
            .map_err(|error| Error::internal(format!("cannot start the thread {name}: {error}")))?;
        Ok(Self { work })
    }

    /// Runs `piece` on the thread, inside the caller's tracing span.
    pub async fn call<R: Send + 'static>(&self, piece: impl FnOnce(&mut T) -> R + Send + 'static) -> Result<R> {
        let (answer, answered) = oneshot::channel();
        let span = tracing::Span::current();
        let boxed: Work<T> = Box::new(move |owned| {
            let result = span.in_scope(|| piece(owned));
            // Whoever asked may have gone; the work is then of no use to anyone.
            let _ = answer.send(result);
        });
        self.work.send(boxed).await.map_err(|_| Error::internal("the model thread has ended"))?;
        answered.await.map_err(|_| Error::internal("the model thread panicked; its message is above in the log"))
    }
}
