// The connection: backoff, asking for snapshots, the end of a session.

import assert from "node:assert/strict";
import test from "node:test";
import { Live } from "../../webui/js/live.js";

/** A world in which time moves only when told to. */
class World {
  constructor() {
    this.time = 1000;
    this.timers = [];
    this.sockets = [];
    this.links = [];
    this.ended = 0;
    this.sessionIsOver = false;
    this.wantsSnapshot = false;
    this.live = new Live({
      open: () => this.open(),
      onMessage: () => this.wantsSnapshot,
      onLink: (link) => this.links.push(link),
      onEnded: () => (this.ended += 1),
      isSessionOver: async () => this.sessionIsOver,
      now: () => this.time,
      timers: {
        setTimeout: (act, ms) => {
          const timer = { act, at: this.time + ms / 1000 };
          this.timers.push(timer);
          return timer;
        },
        clearTimeout: (timer) => {
          this.timers = this.timers.filter((each) => each !== timer);
        },
      },
    });
    this.live.start();
  }

  open() {
    const sent = [];
    const socket = { sent, send: (text) => sent.push(text), close: () => {} };
    this.sockets.push(socket);
    return socket;
  }

  get socket() {
    return this.sockets.at(-1);
  }

  pass(seconds) {
    const end = this.time + seconds;
    let due;
    while ((due = this.timers.find(({ at }) => at <= end))) {
      this.timers = this.timers.filter((each) => each !== due);
      this.time = due.at;
      due.act();
    }
    this.time = end;
  }

  say(message) {
    this.socket.onmessage({ data: JSON.stringify(message) });
  }
}

test("the first message makes it live", () => {
  const world = new World();
  assert.equal(world.links.at(-1).state, "connecting");

  world.say({ kind: "snapshot" });

  assert.deepEqual(world.links.at(-1), {
    state: "live",
    downSince: null,
    attempt: 0,
    retryAt: null,
  });
});

test("it tries again after 1, 2, 4, 8, 16 and then every 30 seconds", () => {
  const world = new World();
  const waits = [];

  for (let i = 0; i < 7; i++) {
    world.socket.onclose({ code: 1006 });
    waits.push(world.links.at(-1).retryAt - world.time);
    world.pass(waits.at(-1));
  }

  assert.deepEqual(waits, [1, 2, 4, 8, 16, 30, 30]);
  assert.equal(world.sockets.length, 8);
});

test("a connection that worked starts the waits anew", () => {
  const world = new World();
  for (let i = 0; i < 3; i++) {
    world.socket.onclose({ code: 1006 });
    world.pass(30);
  }

  world.say({ kind: "snapshot" });
  world.socket.onclose({ code: 1001 });

  const { downSince, retryAt } = world.links.at(-1);
  assert.deepEqual([downSince, retryAt], [world.time, world.time + 1]);
});

test("trying now doesn't wait, and opens no second connection", () => {
  const world = new World();
  world.socket.onclose({ code: 1006 });

  world.live.tryNow();
  world.live.tryNow();
  world.pass(1);

  assert.equal(world.sockets.length, 2);
});

test("a stale page asks for a snapshot once", () => {
  const world = new World();
  world.say({ kind: "snapshot" });
  world.wantsSnapshot = true;

  world.say({ kind: "resync" });
  world.say({ kind: "fleet.updated" });
  assert.deepEqual(world.socket.sent, ['{"want":"snapshot"}']);

  world.wantsSnapshot = false;
  world.say({ kind: "snapshot" });
  world.wantsSnapshot = true;
  world.say({ kind: "resync" });
  assert.equal(world.socket.sent.length, 2);
});

test("a long silence is tested with a question, and no answer is a lost line", () => {
  const world = new World();
  world.say({ kind: "snapshot" });

  world.pass(45);
  assert.equal(world.socket.sent.length, 1);
  assert.equal(world.links.at(-1).state, "live");

  world.pass(15);
  assert.equal(world.links.at(-1).state, "down");
});

test("an answer to the question keeps the line", () => {
  const world = new World();
  world.say({ kind: "snapshot" });

  world.pass(45);
  world.say({ kind: "snapshot" });
  world.pass(44);

  assert.equal(world.links.at(-1).state, "live");
  assert.equal(world.socket.sent.length, 1);
});

test("a connection that never opens is given up", () => {
  const world = new World();

  world.pass(15);

  assert.equal(world.links.at(-1).state, "down");
});

test("a close event that comes late counts for nothing", () => {
  const world = new World();
  const old = world.socket;
  world.pass(16);
  world.say({ kind: "snapshot" });

  old.onclose({ code: 1006 });

  assert.equal(world.links.at(-1).state, "live");
});

test("the end of the session leads away and is not tried again", () => {
  const world = new World();
  world.say({ kind: "snapshot" });

  world.socket.onclose({ code: 4401 });
  world.pass(100);

  assert.deepEqual([world.ended, world.sockets.length], [1, 1]);
});

test("a refused connection leads away when the session is the reason", async () => {
  const world = new World();
  world.sessionIsOver = true;

  world.socket.onclose({ code: 1006 });
  await Promise.resolve();
  await Promise.resolve();

  assert.equal(world.ended, 1);
});
