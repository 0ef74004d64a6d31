// The websocket: connects, passes messages on, asks for snapshots, tries again.
//
// It knows neither the view nor the page; the socket, the timers and the clock come in.

/** Our own close code: the session has ended, log in again. */
const SESSION_ENDED = 4401;
const FIRST_DELAY_S = 1;
const LONGEST_DELAY_S = 30;
/** Quiet for so long, we ask for a snapshot to see whether anybody is there. */
const QUIET_S = 45;
const ANSWER_S = 15;

export class Live {
  /**
   * @param {object} parts
   *   `open()` returns a new WebSocket; `onMessage(message)` returns true when it
   *   wants a snapshot; `onLink(link)` gets {state, downSince, attempt, retryAt};
   *   `onEnded()` is called when the session is over; `isSessionOver()` resolves to
   *   whether it is, for a connection that was refused; `now()` returns seconds;
   *   `timers` has setTimeout and clearTimeout.
   */
  constructor({ open, onMessage, onLink, onEnded, isSessionOver, now, timers }) {
    Object.assign(this, {
      open,
      onMessage,
      onLink,
      onEnded,
      isSessionOver,
      now,
      timers,
    });
    this.attempt = 0;
    this.downSince = null;
    this.socket = null;
    this.timer = null;
  }

  /** Connect, and keep connected. */
  start() {
    this.downSince = this.now();
    this.connect();
  }

  /** Connect at once instead of after the rest of the wait. */
  tryNow() {
    if (this.socket === null) this.connect();
  }

  connect() {
    this.setTimer(ANSWER_S, () => this.drop());
    this.asked = false;
    this.report("connecting", null);
    const socket = this.open();
    this.socket = socket;
    socket.onmessage = ({ data }) => this.take(socket, JSON.parse(data));
    socket.onclose = ({ code }) => this.closed(socket, code);
  }

  take(socket, message) {
    if (socket !== this.socket) return;
    if (this.downSince !== null) {
      this.attempt = 0;
      this.downSince = null;
      this.report("live", null);
    }
    if (message.kind === "snapshot") this.asked = false;
    this.setTimer(QUIET_S, () => this.ask());
    if (this.onMessage(message)) this.ask();
  }

  ask() {
    if (!this.asked) this.socket.send('{"want":"snapshot"}');
    this.asked = true;
    this.setTimer(ANSWER_S, () => this.drop());
  }

  // Close events of a dead network can take minutes to come.
  drop() {
    const { socket } = this;
    socket.close();
    this.closed(socket, null);
  }

  closed(socket, code) {
    if (socket !== this.socket) return;
    const wasRefused = this.downSince !== null;
    this.socket = null;
    this.timers.clearTimeout(this.timer);
    if (code === SESSION_ENDED) {
      this.onEnded();
      return;
    }
    this.downSince ??= this.now();
    this.attempt += 1;
    const delay = Math.min(FIRST_DELAY_S * 2 ** (this.attempt - 1), LONGEST_DELAY_S);
    this.setTimer(delay, () => this.connect());
    this.report("down", this.now() + delay);
    if (wasRefused) this.leaveIfOver();
  }

  // A refused handshake doesn't tell a page why; the session may be the reason.
  async leaveIfOver() {
    if (await this.isSessionOver()) this.onEnded();
  }

  report(state, retryAt) {
    const { attempt, downSince } = this;
    this.onLink({ state, downSince, attempt, retryAt });
  }

  setTimer(seconds, act) {
    this.timers.clearTimeout(this.timer);
    this.timer = this.timers.setTimeout(act, 1000 * seconds);
  }
}
