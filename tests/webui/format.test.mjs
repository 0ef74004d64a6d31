// Numbers and times in words, labels on a line, commands in a sentence.

import assert from "node:assert/strict";
import test from "node:test";
import { placeLabels } from "../../webui/js/axis.js";
import { splitCommands } from "../../webui/js/command.js";
import {
  age,
  bytes,
  clockTime,
  count,
  dayTime,
  duration,
  number,
  percent,
  short,
  utc,
} from "../../webui/js/format.js";

process.env.TZ = "UTC";
const MONDAY = Date.UTC(2026, 10, 23, 18, 42, 7) / 1000;

const tables = [
  [
    number,
    [[0], "0"],
    [[999], "999"],
    [[4417], "4\u2009417"],
    [[1234567], "1\u2009234\u2009567"],
    [[2.3456, 3], "2.346"],
    [[1234.5, 1], "1\u2009234.5"],
    [[-3.25, 1], "−3.3"],
    [[-0.001, 1], "0.0"],
  ],
  [
    short,
    [[9999], "9\u2009999"],
    [[12_340], "12.3\u00a0k"],
    [[734_200_000], "734.2\u00a0M"],
    [[1_200_000_000], "1.20\u00a0G"],
  ],
  [bytes, [[0], "0\u00a0B"], [[9999], "9\u2009999\u00a0B"], [[2_600_000], "2.6\u00a0MB"]],
  [percent, [[0.374], "37\u00a0%"], [[0.6118, 1], "61.2\u00a0%"]],
  [
    duration,
    [[0], "0:00"],
    [[-5], "0:00"],
    [[42], "0:42"],
    [[581], "9:41"],
    [[3599.4], "59:59"],
    [[3600], "1 h 00 min"],
    [[86_399], "23 h 59 min"],
    [[90_000], "1 d 1 h"],
  ],
  [age, [[2.4], "2\u00a0s"], [[59.6], "1:00"], [[581], "9:41"]],
  [
    count,
    [[1, "task"], "1 task"],
    [[0, "task"], "0 tasks"],
    [[2000, "task"], "2\u2009000 tasks"],
  ],
  [clockTime, [[MONDAY], "18:42"], [[MONDAY, { seconds: true }], "18:42:07"]],
  [
    dayTime,
    [[MONDAY, MONDAY - 3600], "18:42"],
    [[MONDAY, MONDAY - 86_400], "Mon 23 Nov, 18:42"],
  ],
  [utc, [[MONDAY], "2026-11-23 18:42:07 UTC"]],
];
for (const [format, ...cases] of tables) {
  test(`${format.name} says`, () => {
    for (const [given, expected] of cases) assert.equal(format(...given), expected);
  });
}

test("labels that would overlap give way to the more important one", () => {
  const labels = [
    { at: 0.5, text: "middle", rank: 1 },
    { at: 0.52, text: "important", rank: 0 },
    { at: 0, text: "start", rank: 2 },
  ];

  const texts = placeLabels(labels, 400).map(({ text }) => text);

  assert.deepEqual(texts, ["important", "start"]);
});

test("labels stay inside the line", () => {
  const [left, right] = placeLabels(
    [
      { at: 0, text: "left", rank: 0 },
      { at: 1, text: "right", rank: 1 },
    ],
    300,
  );

  assert.equal(left.px, 0);
  assert.ok(right.px + 6 * "right".length <= 300);
});

test("commands are cut out of their sentence", () => {
  const sentence = "No corpus. Run `bitnet-coordinator prepare x`, then `ls`.";

  assert.deepEqual(splitCommands(sentence), [
    { text: "No corpus. Run" },
    { command: "bitnet-coordinator prepare x" },
    { text: "then" },
    { command: "ls" },
  ]);
});

test("a line that begins with our program is a command too", () => {
  assert.deepEqual(splitCommands("Do this:\n  bitnet-coordinator init-db\nand wait."), [
    { text: "Do this:" },
    { command: "bitnet-coordinator init-db" },
    { text: "and wait." },
  ]);
});

test("a sentence without a command stays one text", () => {
  assert.deepEqual(splitCommands("Wait."), [{ text: "Wait." }]);
});
